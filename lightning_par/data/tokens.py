"""Training on folders of tokens, as a data module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_par.data.order import Order, replica_of
from lightning_par.data.sample import Sample, check_format
from lightning_par.data.windows import Documents, TokenFiles, Windows, documents_at_end
from lightning_par.errors import DataError

PACKINGS = ("windows", "documents")


class Tokens(pl.LightningDataModule):
    """Samples of a folder that `lightning-par tokenize` wrote. Each batch is what `lightning_par.data.sample` describes.

    Args:
        path: the folder.
        context: tokens of a sample.
        batch_size: samples of a batch of one replica.
        packing: ``windows``, all documents one after another, cut every ``context`` tokens; or ``documents``, whole ones beside
            each other.
        format: ``tokens`` or ``transformers``.
        validation_path: another folder, whose end is for validation; None holds out the end of ``path``.
        num_validation_samples: of validation; with documents about so many.
        seed: of the order of training samples, which is the same in every layout.
        num_workers: processes that read for each rank.
    """

    def __init__(
        self,
        path: str,
        context: int = 1024,
        batch_size: int = 16,
        packing: str = "windows",
        format: str = "tokens",
        validation_path: str | None = None,
        num_validation_samples: int = 256,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if packing not in PACKINGS:
            raise DataError(f"data.packing={packing}: there is no such packing: use {' or '.join(PACKINGS)}")
        self.path, self.context, self.batch_size = Path(path), context, batch_size
        self.packing, self.format = packing, check_format(format)
        self.validation_path = None if validation_path is None else Path(validation_path)
        self.num_validation_samples, self.seed, self.num_workers = num_validation_samples, seed, num_workers

    def setup(self, stage: str) -> None:
        """Map the files into memory; with documents, fit them into samples.

        Raises:
            DataError: there are no such folders, or too few tokens.
        """
        tokens = TokenFiles(self.path)
        if self.validation_path is None:
            self.training, self.validation = self._held_out(tokens)
        else:
            self.training, _ = self._split(tokens, 0)
            _, self.validation = self._split(TokenFiles(self.validation_path), self.num_validation_samples)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Raises DataError where there are fewer samples than a batch of all replicas."""
        _, replicas = replica_of(self.trainer)
        together, there = self.batch_size * replicas, len(self.training)  # type: ignore[arg-type]
        if there < together:
            raise DataError(
                f"data.path={self.path} has {there} samples of {self.context} tokens to train on, and a batch of all replicas is "
                f"{together} of them: make data.batch_size or data.context smaller"
            )
        return self._loader(self.training, Order(self.training, self.trainer, shuffle=True, seed=self.seed), drop_last=True)

    def val_dataloader(self) -> Any:
        if not len(self.validation):  # type: ignore[arg-type]
            return []
        return self._loader(self.validation, Order(self.validation, self.trainer, shuffle=False), drop_last=False)

    def _held_out(self, tokens: TokenFiles) -> tuple[Dataset[Sample], Dataset[Sample]]:
        """Samples for training and, from the end, for validation."""
        training, validation = self._split(tokens, self.num_validation_samples)
        if not len(training):  # type: ignore[arg-type]
            raise DataError(
                f"data.path={self.path} has nothing to train on beside data.num_validation_samples={self.num_validation_samples} "
                f"of {self.context} tokens: make them fewer, or name a data.validation_path"
            )
        return training, validation

    def _split(self, tokens: TokenFiles, count: int) -> tuple[Dataset[Sample], Dataset[Sample]]:
        """All samples but about the last ``count``, and those."""
        if self.packing == "windows":
            windows = Windows(tokens, self.context, self.format)
            first = max(0, len(windows) - count)
            return Subset(windows, range(first)), Subset(windows, range(first, len(windows)))
        documents = sum(shard.documents for shard in tokens.index.shards)
        first = max(0, documents - documents_at_end(tokens, count * self.context)) if count else documents
        parts = (0, first), (first, documents)
        training, validation = (Documents(tokens, self.context, self.format, *part) for part in parts)
        return training, validation

    def _loader(self, dataset: Dataset[Sample], order: Order, drop_last: bool) -> DataLoader[Sample]:
        workers, stay = self.num_workers, self.num_workers > 0
        return DataLoader(
            dataset, self.batch_size, sampler=order, num_workers=workers, persistent_workers=stay, drop_last=drop_last
        )
