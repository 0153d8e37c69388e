"""Modules and data for `lightning-par check`, each with one trait that it must cope with, or that it must find."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

WIDTH, VOCABULARY, LENGTH = 16, 24, 6


class Block(nn.Module):
    """Drops in every way; its keys have a bias, whose gradient is all rounding."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.rate, self.drop = rate, nn.Dropout(rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.norm(x)
        q, k, v = (layer(inner).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate)
        x = x + self.drop(self.output(mixed.transpose(1, 2).flatten(2)))
        return x + F.dropout(self.down(self.up(x).relu()), self.rate, self.training)


class Model(pl.LightningModule):
    """A plain model that trains in any layout as in one process, but for its dropout.

    It makes its blocks in ``configure_model`` and writes a folder in a callback of its own, which a check has no use for.
    """

    def __init__(self, depth: int = 4, rate: float = 0.2) -> None:
        super().__init__()
        self.depth, self.rate = depth, rate
        self.blocks: nn.ModuleList | None = None

    def configure_model(self) -> None:
        if self.blocks is None:
            self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
            self.blocks = nn.ModuleList([self.make_block() for _ in range(self.depth)])

    def configure_callbacks(self) -> list[pl.Callback]:
        return [pl.callbacks.ModelCheckpoint("written", every_n_train_steps=1)]

    def make_block(self) -> nn.Module:
        return Block(self.rate)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        assert self.blocks is not None
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]

    def losses(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of each target."""
        return F.cross_entropy(self.logits(batch["tokens"]).flatten(0, 1), batch["targets"].flatten(), reduction="none")

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.losses(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Summed(Model):
    """A loss that is a sum: each microbatch counts by itself, and the mean of the sums is no sum."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.losses(batch).sum()


class Noisy(Model):
    """Draws noise that the loss depends on."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        losses = self.losses(batch)
        return (losses * torch.rand_like(losses)).mean()


class Undefined(Model):
    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.losses(batch).mean() * torch.nan


class Failing(Model):
    """Fails where it trains with others."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.trainer.training and dist.is_initialized() and dist.get_rank() == 1:
            raise OSError("the disk of rank 1 is full")
        return super().training_step(batch, batch_idx)


class Counted(Model):
    """Needs all of its blocks."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self.blocks is not None
        x = self.embedding(tokens)
        for index in range(self.depth):
            x = self.blocks[index](x)
        return self.head(x)  # type: ignore[no-any-return]


class Samples(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        drawn = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=torch.Generator().manual_seed(index))
        return {"tokens": drawn[:-1], "targets": drawn[1:]}


class Data(pl.LightningDataModule):
    """Made in ``setup``; a hook of it is a part of the training."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        self.samples = Samples()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, self.batch_size, shuffle=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "targets": (batch["targets"] + 1) % VOCABULARY}


class Ragged(Data):
    """Batches of several lengths, which do not fit together."""

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples, batch_sampler=[[0, 1], [2, 3]] * 8, collate_fn=_Ragged())  # type: ignore[arg-type]


class _Ragged:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        self.count += 1
        length = LENGTH - self.count % 2
        return {key: torch.stack([sample[key][:length] for sample in samples]) for key in samples[0]}


class WithData(Model):
    """Brings its own data."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Samples(), 8)
