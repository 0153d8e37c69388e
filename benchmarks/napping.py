"""The model on which all pipelines are timed: a chain of equal blocks that sleep, so that a stage costs what is asked for.

    F   sleeps in the forward
    I   sleeps in the backward, on the way of the hidden state
    W   sleeps in the backward, on the way of the weight: where a system computes weight gradients apart, it sleeps there

Each happens once for a stage and microbatch, whoever runs the backward in whatever parts. Sleeping takes no core, so that more
ranks than cores overlap as they would on as many devices.

[Note: warm] A host that feeds a device goes on computing while the device does; one that sleeps does not, and finds its caches
taken by others: on 2 cores of a virtual machine a linear layer takes 0.08 ms, forward and backward, and 0.7 ms after 10 ms of
sleep (or of a loop that does nothing). So the last moment of a nap is spent on a layer that is nobody's, which brings back much of
what a step without work has in its caches. Naps that only sleep are measured beside these.
"""

from __future__ import annotations

import ctypes
import platform
import time
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

NUM_BLOCKS, WIDTH = 16, 32
NUM_RANKS, NUM_MICROBATCHES, MICROBATCH_SIZE = 4, 8, 2
TOLERANCE = 1e-4  # gradients are read off a step of the optimizer: fp32 weights of 0.1 keep 5 digits of them
_PR_SET_TIMERSLACK = 29  # of linux/prctl.h
_REHEARSAL_SECONDS = 0.0015  # at the end of a nap: a cold forward and backward takes half of it


@dataclass
class Naps:
    """How long a block sleeps, in seconds; changed between steps.

    Attributes:
        forward: in F.
        input_gradient: in I.
        weight_gradient: in W.
        is_warm: whether naps leave the caches warm; see [Note: warm].
    """

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    is_warm: bool = True
    _late: float = 0.0
    _spare: nn.Linear = field(default_factory=lambda: nn.Linear(WIDTH, WIDTH))

    def sleep(self, seconds: float) -> None:
        """Sleep; nothing at all for 0.

        Where there are more ranks than cores, one that wakes has to wait for a core, half a millisecond or so. The next naps are so
        much shorter, so that the sleep of a rank in a step is what was asked for.
        """
        if not seconds:
            return
        begin = time.perf_counter()
        end = begin + seconds - self._late
        if self.is_warm:
            _sleep_until(end - _REHEARSAL_SECONDS)
            self.rehearse()
        _sleep_until(end)
        self._late += time.perf_counter() - begin - seconds

    def rehearse(self) -> None:
        """Compute something that is nobody's, forward and backward."""
        with torch.enable_grad():
            x = torch.ones(MICROBATCH_SIZE, WIDTH, requires_grad=True)
            torch.autograd.grad((x + self._spare(x).tanh()).sum(), [x, self._spare.weight])

    def work(self, seconds: float, is_warm: bool = True) -> None:
        """Let each rank work so many seconds in each of F, I and W of a microbatch."""
        self.forward = self.input_gradient = self.weight_gradient = seconds * NUM_RANKS / NUM_BLOCKS
        self.is_warm = is_warm


def _sleep_until(end: float) -> None:
    time.sleep(max(0.0, end - time.perf_counter()))


class Block(nn.Module):
    """``x + tanh(linear(x))``, asleep for a while.

    Args:
        naps: how long the blocks of a stage sleep, each alike.
        share: how many of these naps this block takes. The first of a stage takes those of all, so that few naps end late.

    Attributes:
        naps_in_graph: whether W sleeps in the graph of autograd. Else the system that computes the weight's gradient must do it.
    """

    def __init__(self, naps: Naps, share: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        setattr(self.linear.weight, "share", share)  # noqa: B010  # mypy; for who computes its gradient outside of the graph
        self.naps, self.share, self.naps_in_graph = naps, share, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, y = self.linear.weight, x
        if self.share and self.naps_in_graph:
            y = F.linear(x, _WeightNap.apply(weight, self.naps, self.share), self.linear.bias)
        else:
            y = self.linear(x)
        if self.share:
            y = _Nap.apply(y, self.naps, self.share)
        return x + y.tanh()


class Chain(pl.LightningModule):
    """Blocks, and the loss of their output; the same weights at every call of `make_chain`."""

    def __init__(self, naps: Naps, num_stages: int) -> None:
        super().__init__()
        size = NUM_BLOCKS // num_stages
        self.blocks = nn.Sequential(*(Block(naps, 0 if index % size else size) for index in range(NUM_BLOCKS)))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.mse_loss(self.blocks(batch[0]), batch[1])


def make_chain(naps: Naps, num_stages: int = NUM_RANKS) -> Chain:
    torch.manual_seed(0)
    return Chain(naps, num_stages)


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets ``[samples, width]`` of all microbatches, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_MICROBATCHES * MICROBATCH_SIZE, WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class Truth:
    """What one process computes of `make_batch`.

    Attributes:
        loss: the mean.
        gradients: of every weight, by name.
    """

    loss: float
    gradients: dict[str, torch.Tensor]

    def check(self, loss: float | None, gradients: dict[str, torch.Tensor]) -> None:
        """Hold what a rank computed against the truth.

        Args:
            loss: None on a rank that is not told.
            gradients: of the weights that the rank holds, by name.

        Raises:
            ValueError: what differs, by how much.
        """
        if loss is not None and abs(loss - self.loss) > TOLERANCE * abs(self.loss):
            raise ValueError(f"the loss is {loss}, and {self.loss} in one process")
        for name, found in gradients.items():
            truth = self.gradients[name]
            error = float((found - truth).norm() / truth.norm())
            if not error <= TOLERANCE:
                raise ValueError(f"the gradient of {name} is off by {error:.1e} of that in one process, more than {TOLERANCE}")


def compute_truth() -> Truth:
    """Loss and gradients of the whole chain in this process."""
    model = make_chain(Naps())
    loss = model.training_step(make_batch(), 0)
    loss.backward()
    return Truth(loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def wake_in_time() -> None:
    """Have this thread woken within a microsecond of what it asked for, and not 50 us later as is Linux's default."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)


class _Nap(torch.autograd.Function):
    """The hidden state as it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, naps: Naps, share: int) -> torch.Tensor:
        ctx.naps, ctx.share = naps, share
        naps.sleep(share * naps.forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.naps.sleep(ctx.share * ctx.naps.input_gradient)
        return grad, None, None


class _WeightNap(torch.autograd.Function):
    """A weight as it is. Its backward runs where, and only where, the weight's gradient is computed."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, naps: Naps, share: int) -> torch.Tensor:
        ctx.naps, ctx.share = naps, share
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.naps.sleep(ctx.share * ctx.naps.weight_gradient)
        return grad, None, None
