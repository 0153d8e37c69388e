"""A small module into which anything can be planted at a step, for the tests of what guards a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_par import HybridParallelStrategy
from tests.ranks import machines

WIDTH, LENGTH, ROWS, STEPS = 8, 3, 4, 3


class BadBackward(torch.autograd.Function):
    """The identity, whose gradient is undefined."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * torch.nan


class Gate(nn.Module):
    """Between the layers of a block, where activations are in parts under tp.

    Attributes:
        factor: what the output is multiplied by.
    """

    factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(x) * self.factor


class Block(nn.Module):
    """``x + down(gate(up(norm(x))))``; with ``is_bad`` its backward alone is undefined."""

    is_bad = False

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(WIDTH), Gate()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_bad:
            x = BadBackward.apply(x)
        return x + self.down(self.gate(self.up(self.norm(x))))


class Scaled(nn.Module):
    """Undefined where all is zero, as on a stage that has zeros in the place of the weights before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.detach().abs().amax()


class Network(nn.Module):
    """A chain between other layers.

    Attributes:
        factor: of what the blocks give.
    """

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.scaled = nn.Linear(WIDTH, WIDTH, bias=False), Scaled()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.leave: nn.Module = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scaled(self.enter(x))
        for block in self.blocks:
            x = block(x)
        return self.leave(self.norm(x * self.factor))


class Guarded(pl.LightningModule):
    """Plants what it is told in one step.

    Args:
        plant: what is bad: the ``forward`` or ``backward`` of a block, a ``parameter`` of it, the code ``between`` modules or that
            of the ``loss``, or that at ``random``; or nothing.
        where: the block, and the step; a batch is one step.
        only_rank: which rank alone; None for all.
        is_tied: whether the last layer has the weight of the first.
    """

    def __init__(
        self, plant: str = "", where: tuple[int, int] = (2, 1), only_rank: int | None = None, is_tied: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.dropout = Network(), nn.Dropout(0.1)
        if is_tied:
            self.network.leave = nn.Linear(WIDTH, WIDTH)
            self.network.leave.weight = self.network.enter.weight
        self.plant, self.where, self.only_rank = plant, where, only_rank

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        place, step = self.where
        is_now = batch_idx == step and self.only_rank in (None, self.global_rank)
        block: Any = self.network.blocks[place]
        block.gate.factor = torch.nan if is_now and self.plant == "forward" else 1.0
        block.is_bad = is_now and self.plant == "backward"
        self.network.factor = torch.inf if is_now and self.plant == "between" else 1.0
        output = self.dropout(self.network(batch["x"]))
        if is_now and self.plant == "loss":
            output = output - torch.inf
        if self.plant == "random":
            output = output.masked_fill(torch.rand(()) < 0.05, torch.nan)
        return (output - batch["y"]).square().mean()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        place, step = self.where
        if self.plant == "parameter" and batch_idx == step and self.only_rank in (None, self.global_rank):
            block: Any = self.network.blocks[place]
            values: torch.Tensor = getattr(block.down.bias, "ds_tensor", block.down.bias)  # under ZeRO-3 this rank's part
            values.data[-1:] = torch.nan

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def batches(num_rows: int, bad_step: int | None = None) -> list[dict[str, torch.Tensor]]:
    """A batch for each step; one has an infinite number in its last sample."""
    generator = torch.Generator().manual_seed(1)
    made = [{name: torch.randn(num_rows, LENGTH, WIDTH, generator=generator) for name in "xy"} for _ in range(STEPS)]
    if bad_step is not None:
        made[bad_step]["x"][-1, 0, 0] = torch.inf
    return made


def fit(
    module: pl.LightningModule,
    data: Sequence[Any],
    layout: str,
    world_size: int,
    strategy: Mapping[str, Any] | None = None,
    **options: Any,
) -> pl.Trainer:
    """Train on the batches, the same on every replica; the Trainer."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        strategy=HybridParallelStrategy(layout, print_plan=False, **(strategy or {})),
        max_epochs=1,
        use_distributed_sampler=False,
        **machines(world_size),
        **{**quiet, **options},
    )
    loader: Any = DataLoader(list(data), batch_size=None)
    trainer.fit(module, loader)
    return trainer
