"""Small modules and plans of them, for tests that need no ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_par import HybridParallelStrategy
from lightning_par.layout import parse_layout
from lightning_par.plan import LayerPlan, Plan
from lightning_par.prepare import prepare_plan


class Chain(pl.LightningModule):
    """Tokens, blocks, head; the loss is a mean, so that nothing but the blocks matters."""

    def __init__(self, make_block: Callable[[], nn.Module], depth: int = 2, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, width)
        self.blocks = nn.ModuleList([make_block() for _ in range(depth)])
        self.head = nn.Linear(width, 24, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(batch["tokens"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Unordered(Chain):
    """Runs its blocks from the last to the first."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in reversed(self.blocks):
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


class Block(nn.Module):
    """The least that tensor parallelism splits: a column layer, a row layer, a residual."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def quiet_trainer(word: str, devices: int = 4, plan: Mapping[str, Any] | None = None, **options: Any) -> pl.Trainer:
    """A Trainer of the strategy that writes and prints nothing; other options win."""
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    strategy = HybridParallelStrategy(word, plan=plan)
    return pl.Trainer(**{"accelerator": "cpu", "devices": devices, "strategy": strategy, **silent, **options})


def loader_of(*batches: Any) -> DataLoader[Any]:
    """Batches as they are."""
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]  # torch asks for a Dataset


def tokens(size: int = 4, length: int = 6) -> dict[str, torch.Tensor]:
    return {"tokens": torch.randint(0, 24, (size, length), generator=torch.Generator().manual_seed(0))}


def plan_of(module: nn.Module, word: str, batch: Any = None, overrides: Mapping[str, Any] | None = None) -> Plan:
    """The plan for a layout word, on as many devices as it needs."""
    layout = parse_layout(word)
    return prepare_plan(module, tokens() if batch is None else batch, layout.resolve(layout.world_size), overrides)


def kinds(plan: Plan) -> dict[str, str]:
    """Kind of split by layer, of the first block only and without the path to it."""
    prefix = f"{plan.chain.blocks[0]}." if plan.chain else ""
    others = f"{plan.chain.paths[0]}." if plan.chain else " "
    return {
        layer.name.removeprefix(prefix): layer.kind
        for layer in plan.layers
        if layer.name.startswith(prefix) or not layer.name.startswith(others)
    }


def layer_of(plan: Plan, name: str) -> LayerPlan:
    """The plan of a layer, by its path in the first block."""
    assert plan.chain is not None
    return next(layer for layer in plan.layers if layer.name == f"{plan.chain.blocks[0]}.{name}")
