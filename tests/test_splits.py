"""Every way to write a projection that the plan tells apart trains as in one process, on plain or on sharded activations."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from tests.models import VOCABULARY, adamw
from tests.parity import MakeModel, check_parity
from tests.test_plan import FUSED, GATES, GLOBAL, LOCAL, SIZE, WIDTH, Fused, Gated, ParallelBlock, Probe, attend


class Language(pl.LightningModule):
    """A language model of four blocks."""

    def __init__(self, make_block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.blocks = nn.Sequential(*(make_block() for _ in range(4)))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        tokens = batch["tokens"]
        logits = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


class Normed(ParallelBlock):
    """Norms next to split activations: over each head, or over all heads together, with local or with global sizes."""

    def __init__(self, heads: int, over: int) -> None:
        super().__init__()
        self.heads, self.over, self.q_norm = heads, over, nn.LayerNorm(over)
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)  # the gradient of its bias is zero but for rounding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x) if self.over == WIDTH else self.q(x).unflatten(-1, (-1, self.over))
        q = self.q_norm(q).reshape(*x.shape[:2], -1)
        q, k, v = (y.view(*x.shape[:2], self.heads, SIZE).transpose(1, 2) for y in (q, self.k(x), self.v(x)))
        return x + self.o(attend(q, k, v)) + self.down(F.gelu(self.up(x)))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "norm of heads": lambda: Normed(-1, SIZE),
    "norm of heads, global sizes": lambda: Normed(4, SIZE),
    "norm of all": lambda: Normed(-1, WIDTH),
    **{f"fused, {way}": lambda take=take, sizes=sizes: Fused(take, sum(sizes)) for way, (take, sizes) in FUSED.items()},  # type: ignore[misc]
    **{f"gated, {way}": lambda take=take: Gated(take) for way, (take, _, _) in GATES.items()},  # type: ignore[misc]
    **{way: lambda between=between: Probe(between) for way, between in {**LOCAL, **GLOBAL}.items() if way != "dropout"},  # type: ignore[misc]
}
MODELS: dict[str, MakeModel] = {name: lambda block=block: Language(block) for name, block in BLOCKS.items()}  # type: ignore[misc]


def test_every_way_trains_as_in_one_process() -> None:
    check_parity(MODELS, "tp2")
