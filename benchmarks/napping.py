"""The model on which all pipelines are timed: a chain of equal blocks that sleep, so that a stage costs what is asked for.

    F   sleeps in the forward
    I   sleeps in the backward, on the way of the hidden state
    W   sleeps in the backward, on the way of the weight: where a system computes weight gradients apart, it sleeps there

Each happens once for a stage and microbatch, whoever runs the backward in whatever parts. Sleeping takes no core, so that more
ranks than cores overlap as they would on as many devices.

[Note: made up for] A stage's F, I and W are to take so much longer than in a step without work, and no more; then what is
left of the difference is the system's. By themselves they take more: a rank that wakes has to wait for a core, half a millisecond
or so where there are more ranks than cores; and it finds its caches taken by others, so that a linear layer that takes 0.08 ms,
forward and backward, takes 0.7 ms after 10 ms of sleep. So the next naps are shorter by what a rank has slept too long, and by
what the blocks have computed longer than the median of the steps without work. What a system does before, between and after
them is not made up for.
"""

from __future__ import annotations

import ctypes
import platform
import time
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

NUM_BLOCKS, WIDTH = 16, 32
NUM_RANKS, NUM_MICROBATCHES, MICROBATCH_SIZE = 4, 8, 2
TOLERANCE = 1e-4  # gradients are read off a step of the optimizer: fp32 weights of 0.1 keep 5 digits of them
_PR_SET_TIMERSLACK = 29  # of linux/prctl.h


@dataclass
class Naps:
    """How long a block sleeps, in seconds, and what its naps make up for; see [Note: made up for].

    Attributes:
        forward: in F.
        input_gradient: in I.
        weight_gradient: in W.
        made_up: how much longer blocks have computed than without work; naps were shorter by it. For others to set back.
    """

    forward: float = 0.0
    input_gradient: float = 0.0
    weight_gradient: float = 0.0
    made_up: float = 0.0
    _owed: float = 0.0  # by the next naps
    _part: str = ""  # that computes now
    _begin: float = 0.0  # of it
    _slept: float = 0.0  # since then
    _without_work: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _usual: dict[str, float] = field(default_factory=dict)

    def work(self, seconds: float) -> None:
        """Let each rank work so many seconds in each of F, I and W of a microbatch. With 0, steps without work begin anew."""
        self.forward = self.input_gradient = self.weight_gradient = seconds * NUM_RANKS / NUM_BLOCKS
        if not seconds:
            self._without_work.clear()
        self._usual = {part: median(times) for part, times in self._without_work.items()}
        self._owed, self._part = 0.0, ""

    def begin(self, part: str) -> None:
        """The blocks of a stage begin to compute F, I or W, unless another part has begun, of which it is one then."""
        if not self._part:
            self._part, self._begin, self._slept = part, time.perf_counter(), 0.0

    def end(self, part: str) -> None:
        """They have computed it, if it is what has begun."""
        if self._part != part:
            return
        seconds = time.perf_counter() - self._begin - self._slept
        self._part = ""
        if not self.forward:
            self._without_work[part].append(seconds)
        elif part in self._usual:
            self.made_up += seconds - self._usual[part]
            self._owed += seconds - self._usual[part]

    def sleep(self, seconds: float) -> None:
        """Sleep, less what is owed; nothing at all for 0."""
        if not seconds:
            return
        begin = time.perf_counter()
        time.sleep(max(0.0, seconds - self._owed))
        slept = time.perf_counter() - begin
        self._owed += slept - seconds
        self._slept += slept


class Block(nn.Module):
    """``x + tanh(linear(x))``. The first block of a stage sleeps in its backward, the last one in its forward.

    Args:
        naps: how long a block sleeps.
        size: number of blocks of its stage, for all of which it sleeps, so that few naps end late.
        place: of this one in the stage.

    Attributes:
        naps_in_graph: whether W sleeps in the graph of autograd. Else the system that computes the weight's gradient must do it.
    """

    def __init__(self, naps: Naps, size: int, place: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.naps, self.size, self.naps_in_graph = naps, size, True
        self.is_first, self.is_last = place == 0, place == size - 1
        setattr(self.linear.weight, "num_naps", size if self.is_first else 0)  # noqa: B010  # mypy; for who computes W apart

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_first:
            self.naps.begin("F")
            if torch.is_grad_enabled() and not x.requires_grad:
                x = x.detach().requires_grad_()  # the first stage computes what the others do
            x = _Entrance.apply(x, self.naps, self.size)
        y = (self._linear(x) if self.is_first and self.naps_in_graph else self.linear(x)).tanh()
        return x + (_Exit.apply(y, self.naps, self.size) if self.is_last else y)

    def _linear(self, x: torch.Tensor) -> torch.Tensor:
        """With the nap of W. Where autograd runs W apart, it begins at this block: what later ones compute there is not seen."""
        y = F.linear(x, _WeightNap.apply(self.linear.weight, self.naps, self.size), self.linear.bias)
        if y.grad_fn is not None:
            y.grad_fn.register_prehook(lambda grads: self.naps.begin("W"))
        return y


class Chain(pl.LightningModule):
    """Blocks, and the loss of their output; the same weights at every call of `make_chain`."""

    def __init__(self, naps: Naps, num_stages: int) -> None:
        super().__init__()
        size = NUM_BLOCKS // num_stages
        self.blocks = nn.Sequential(*(Block(naps, size, index % size) for index in range(NUM_BLOCKS)))

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


class _Entrance(torch.autograd.Function):
    """The hidden state as it is, where a stage begins."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, naps: Naps, size: int) -> torch.Tensor:
        ctx.naps, ctx.size = naps, size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.naps.end("I")
        ctx.naps.sleep(ctx.size * ctx.naps.input_gradient)
        return grad, None, None


class _Exit(torch.autograd.Function):
    """What a stage's last block adds to the hidden state, as it is."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, naps: Naps, size: int) -> torch.Tensor:
        ctx.naps = naps
        naps.end("F")
        naps.sleep(size * naps.forward)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.naps.begin("I")
        return grad, None, None


class _WeightNap(torch.autograd.Function):
    """A weight as it is. Its backward runs where, and only where, the weight's gradient is computed."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, naps: Naps, size: int) -> torch.Tensor:
        ctx.naps, ctx.size = naps, size
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.naps.end("W")
        ctx.naps.sleep(ctx.size * ctx.naps.weight_gradient)
        return grad, None, None
