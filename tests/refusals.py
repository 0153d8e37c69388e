"""What is refused, as a user would meet it: each case with the layout, and the module or setting that does not fit it.

docs/works.md shows the messages, see `tests.table`; every one is raised for real, before any process is started.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_par.errors import ConfigurationError
from lightning_par.layout import parse_layout
from tests.planning import Block, Chain, Unordered, quiet_trainer, tokens

MakeModel = Callable[[], pl.LightningModule]


@dataclass(frozen=True)
class Refusal:
    """One thing that is not done.

    Attributes:
        what: what the user has, for the table.
        word: the layout.
        make: builds the module.
        batch: what it is given.
        plan: the user's plan section.
        trainer: options of the Trainer.
    """

    what: str
    word: str
    make: MakeModel = lambda: Chain(Block, depth=4)
    batch: Callable[[], Any] = tokens
    plan: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> str:
        """What the error says.

        Raises:
            AssertionError: there is none.
        """
        batches: Any = [self.batch()]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer = quiet_trainer(self.word, parse_layout(self.word).world_size, self.plan, max_steps=1, **self.trainer)
                trainer.fit(self.make(), DataLoader(batches, batch_size=None))
        except ConfigurationError as error:
            return str(error)
        raise AssertionError(f"{self.what} is not refused in {self.word}")


class Heads(nn.Module):
    """Attention with as many heads of size 8 as one likes; keys may have fewer."""

    def __init__(self, heads: int, key_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.query, self.output = nn.Linear(16, 8 * heads), nn.Linear(8 * heads, 16)
        self.key, self.value = nn.Linear(16, 8 * key_heads), nn.Linear(16, 8 * key_heads)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        return x + self.output(self.dropout(mixed.transpose(1, 2).flatten(2)))


class Normed(Chain):
    """Normalises over the samples of a batch."""

    def __init__(self) -> None:
        super().__init__(Block, depth=4)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(tokens))


class Manual(Chain):
    """Runs its own backward."""

    def __init__(self) -> None:
        super().__init__(Block, depth=4)
        self.automatic_optimization = False


class TwoOptimizers(Chain):
    """Trains its blocks and its head by optimizers of their own."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.blocks, self.head)], []


REFUSALS = (
    Refusal("query heads that tp does not divide", "tp4", lambda: Chain(lambda: Heads(6, 6))),
    Refusal("key heads that tp does not divide", "tp2", lambda: Chain(lambda: Heads(6, 3))),
    Refusal(
        "plain tensors for code that drops parts of them",
        "tp2",
        lambda: Chain(lambda: Heads(4, 4, dropout=0.1)),
        plan={"activation": {"blocks.*.query": "local"}},
    ),
    Refusal("more stages than blocks", "pp4", lambda: Chain(Block, depth=2)),
    Refusal("blocks in another order", "pp2", lambda: Unordered(Block)),
    Refusal("sp without a chain of blocks", "tp2_sp", lambda: Unordered(Block)),
    Refusal("BatchNorm in microbatches", "pp2", Normed),
    Refusal("manual optimization in a pipeline", "pp2", Manual),
    Refusal("several optimizers in a pipeline", "pp2", lambda: TwoOptimizers(Block)),
    Refusal("more microbatches than samples", "pp2_mb4", batch=lambda: tokens(3)),
    Refusal("weights in float16", "tp2", trainer={"precision": "16-true"}),
    Refusal("float64", "dp2_zero1", trainer={"precision": "64-true"}),
    Refusal("BatchNorm over all ranks", "dp2", Normed, trainer={"sync_batchnorm": True}),
    Refusal("recomputation without a chain of blocks", "tp2", lambda: Unordered(Block), plan={"recompute": {"*": "full"}}),
)
