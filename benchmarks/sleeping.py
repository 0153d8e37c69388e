"""A device that computes at a chosen rate: for every product a process sleeps as long as that device would take.

It is below autograd and every layer: whoever multiplies, in a forward, for the gradient of an input or of a weight, sleeps for the
operands that it really multiplies. Sleeping takes no core, so that more ranks than cores overlap as on as many devices.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.slow_links import now, sleep_until

NUM_BLOCKS, WIDTH, LENGTH = 8, 32, 8


class SleepingDevice:
    """While it is entered, every product of two matrices takes its time; the product itself is part of it.

    It is in the place of torch's kernel: a dispatch mode would see the other operations too, and cost more than all of them.

    Args:
        flops: floating-point operations per second.
    """

    def __init__(self, flops: float) -> None:
        self._flops = flops
        self._library: torch.library.Library | None = None

    def __enter__(self) -> None:
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that a kernel is replaced
            self._library.impl("mm", self._multiply, "CPU")

    def __exit__(self, *raised: Any) -> None:
        self._library = None  # the kernel goes with it

    def _multiply(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        begin, output = now(), first.new_empty(first.shape[0], second.shape[1])
        torch.ops.aten.mm.out(first, second, out=output)
        sleep_until(begin + 2 * output.numel() * first.shape[1] / self._flops)
        return output


class Block(nn.Module):
    """A residual block that tp can split."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        updated: torch.Tensor = hidden + self.down(torch.relu(self.up(hidden)))
        return updated


class Chain(pl.LightningModule):
    """Blocks, and the loss of their output; the same weights at every call of `make_chain`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(NUM_BLOCKS)))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.mse_loss(self.blocks(batch[0]), batch[1])


def make_chain() -> Chain:
    torch.manual_seed(0)
    return Chain()


def make_batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets ``[rows, length, width]``; every sample is the same, so that every replica has the same loss."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, LENGTH, WIDTH)
    inputs, targets = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return inputs.repeat(rows, 1, 1), targets.repeat(rows, 1, 1)


def block_flops(rows: int) -> float:
    """Of the forward of a block; those for the gradients of inputs and of weights are as many each."""
    return rows * LENGTH * 2 * 2 * WIDTH * 4 * WIDTH
