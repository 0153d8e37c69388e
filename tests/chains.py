"""Chains with awkward traits: several in a row, side inputs, skips, outputs of every kind. Nothing here knows of stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from tests.planning import Block, Chain

MakeModel = Callable[[], pl.LightningModule]


class Reader(Block):
    """Reads a second tensor beside the hidden state."""

    def forward(self, x: torch.Tensor, side: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * torch.sigmoid(side)


class WithEmbeddings(Chain):
    """Gives every block the embeddings besides the hidden state."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        first = x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, first)
        logits: torch.Tensor = self.head(x)
        return logits


class Skip(Chain):
    """Adds the embeddings after the blocks, by a bare operation."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        first = x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x + first)
        return logits


class Modulated(nn.Module):
    """An MLP under a scale and a shift computed from a condition."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.modulation, self.norm = nn.Linear(width, 2 * width), nn.LayerNorm(width, elementwise_affine=False)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(F.silu(condition))[:, None].chunk(2, -1)
        return x + self.down(F.gelu(self.up(self.norm(x) * (1 + scale) + shift)))


class Diffusion(Chain):
    """A condition for every block and for the layer after them (as in DiT), made by a bare addition."""

    def __init__(self) -> None:
        super().__init__(Modulated, depth=4)
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Embedding(24, 16), Modulated()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        condition = self.first(tokens.float() / 24) + self.second(tokens[:, 0])
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, condition)
        logits: torch.Tensor = self.head(self.last(x, condition))
        return logits


class Biased(Block):
    """Computes a table in the first block, which the others get."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 1))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:  # type: ignore[override]
        bias = self.table.exp() if bias is None else bias
        return super().forward(x) * bias, bias


class Relative(Chain):
    """A bias that the first block makes and returns, as in T5."""

    def __init__(self) -> None:
        super().__init__(Biased, depth=4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, bias = self.embedding(tokens), None
        for block in self.blocks:
            x, bias = block(x, bias=bias)
        logits: torch.Tensor = self.head(x)
        return logits


class Routed(Block):
    """Gives the logits of a router besides."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        logits = self.router(x)
        return super().forward(x) * logits.softmax(-1)[..., :1], logits.flatten(0, 1)


class Experts(Chain):
    """An auxiliary loss over what the routers of all blocks gave."""

    def __init__(self) -> None:
        super().__init__(Routed, depth=4)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, routed = self.embedding(batch["tokens"]), []
        for block in self.blocks:
            x, logits = block(x)
            routed.append(logits)
        aux = torch.cat(routed).softmax(-1).mean(0).square().sum()
        return self.head(x).square().mean() + 0.1 * aux


class Joining(Block):
    """Takes the hidden state of an earlier block in."""

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x if skip is None else self.join(torch.cat([x, skip], -1)))


class LongSkips(Chain):
    """The first half of the blocks feeds the second one, the last the first (as in U-ViT)."""

    def __init__(self) -> None:
        super().__init__(Joining, depth=4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, skips = self.embedding(tokens), []
        for index, block in enumerate(self.blocks):
            x = block(x, skips.pop()) if index >= 2 else block(x)
            if index < 2:
                skips.append(x)
        logits: torch.Tensor = self.head(x)
        return logits


class Named(NamedTuple):
    hidden: torch.Tensor
    side: torch.Tensor


@dataclass
class Data:
    hidden: torch.Tensor
    side: torch.Tensor


class Returning(Block):
    """Gives its result and a second tensor in a container."""

    give: Callable[[torch.Tensor, torch.Tensor], Any]

    def forward(self, x: torch.Tensor, side: torch.Tensor) -> Any:  # type: ignore[override]
        return type(self).give(super().forward(x), side + x.mean(-1, keepdim=True))


class Pairs(Chain):
    """Takes the two out of the container, and gives them to the next block."""

    def __init__(self, give: Callable[[Any, Any], Any], take: Callable[[Any], Any]) -> None:
        super().__init__(type("Returning", (Returning,), {"give": staticmethod(give)}), depth=4)
        self.take = take

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        side = x.mean(-1, keepdim=True)
        for block in self.blocks:
            x, side = self.take(block(x, side))
        logits: torch.Tensor = self.head(x * side)
        return logits


class Halving(nn.Module):
    """Half of the sequence, twice as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * width, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x.unflatten(1, (-1, 2)).flatten(2))
        return y


class Pyramid(Chain):
    """Blocks of two classes, some of which change the shape (as in Swin)."""

    def __init__(self) -> None:
        super().__init__(Block)
        self.blocks = nn.ModuleList([Block(), Halving(16), Block(32), Block(32)])
        self.head = nn.Linear(32, 24)


class Sequence(pl.LightningModule):
    """One Sequential from the embedding to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Embedding(24, 16), Block(), nn.LayerNorm(16), Block(), nn.Linear(16, 24))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.network(batch["tokens"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


CHAINS: dict[str, MakeModel] = {
    "embeddings for every block": lambda: WithEmbeddings(Reader, depth=4),
    "embeddings added after the blocks": lambda: Skip(Block, depth=4),
    "a condition for every block": Diffusion,
    "a bias from the first block": Relative,
    "routers of every block": Experts,
    "long skips": LongSkips,
    "tuples": lambda: Pairs(lambda x, y: (x, None, y), lambda out: (out[0], out[2])),
    "lists": lambda: Pairs(lambda x, y: [y, x], lambda out: (out[1], out[0])),
    "dicts": lambda: Pairs(lambda x, y: {"x": x, "y": {"deep": y}}, lambda out: (out["x"], out["y"]["deep"])),
    "namedtuples": lambda: Pairs(Named, lambda out: (out.hidden, out.side)),
    "dataclasses": lambda: Pairs(Data, lambda out: (out.hidden, out.side)),
    "ModelOutputs": lambda: Pairs(
        lambda x, y: BaseModelOutput(last_hidden_state=x, hidden_states=(y,)), lambda out: (out[0], out.hidden_states[0])
    ),
    "blocks of two classes and three shapes": Pyramid,
    "one Sequential": Sequence,
}
