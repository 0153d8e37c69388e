"""Training on Hugging Face `datasets`: tables and streams of texts, tokenized while training reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_par.data.extra import need
from lightning_par.data.order import Order, replica_of
from lightning_par.data.sample import Sample, check_format, sample_of_window
from lightning_par.data.stream_loader import StreamLoader
from lightning_par.data.streams import Lane, Source, batches
from lightning_par.data.tokenizer import open_tokenizer
from lightning_par.errors import DataError

_WHAT = "data=hugging_face"


class HuggingFace(pl.LightningDataModule):
    """Windows of the texts of a dataset, one after another with a token between them. Training has no end: say ``max_steps``.

    Args:
        training: arguments of ``datasets.load_dataset`` (with ``streaming: true`` for a stream), or a dataset.
        validation: the same; None for none.
        tokenizer: a ``tokenizer.json``; None for the bytes of UTF-8.
        end_of_document: the token after each text, as `open_tokenizer` takes it.
        column: of the texts.
        context: tokens of a sample.
        batch_size: samples of a batch of one replica.
        format: ``tokens`` or ``transformers``.
        num_validation_samples: of validation, at most; they are made once and kept.
        shuffle: whether the order is random: of a table, over all rows; of a stream, that of its files and inside of blocks.
        block: texts that are read, and mixed, at once in each lane.
        lanes: parts of the data that are read side by side. Of a stream no more than divide the number of its files.
        seed: of the order, which is the same in every layout.
        ahead: batches that a thread makes while training computes.
    """

    def __init__(
        self,
        training: Any,
        validation: Any = None,
        tokenizer: str | None = None,
        end_of_document: str | None = None,
        column: str = "text",
        context: int = 1024,
        batch_size: int = 16,
        format: str = "tokens",
        num_validation_samples: int = 256,
        shuffle: bool = True,
        block: int = 1000,
        lanes: int = 8,
        seed: int = 0,
        ahead: int = 4,
    ) -> None:
        super().__init__()
        self.training, self.validation, self.column = training, validation, column
        self.tokenizer_file, self.end_of_document = tokenizer, end_of_document
        self.context, self.batch_size, self.format = context, batch_size, check_format(format)
        self.num_validation_samples, self.shuffle, self.block = num_validation_samples, shuffle, block
        self.lanes, self.seed, self.ahead = lanes, seed, ahead

    def setup(self, stage: str) -> None:
        """Open the datasets, and make the samples of validation.

        Raises:
            DataError: `datasets` or `tokenizers` is not there, a dataset cannot be loaded or has no such column.
        """
        self.tokenizer = open_tokenizer(self.tokenizer_file, self.end_of_document)
        self.source = self._source(self.training, self.shuffle, self.lanes)
        self.samples: list[Sample] = []
        if self.validation is not None:
            lane = Lane(self._source(self.validation, False, 1), 0, self.tokenizer, self.context)
            self.samples = list(_first_turn(lane, self.num_validation_samples, self.format))
            if not self.samples:
                raise DataError(
                    f"data.validation of {_WHAT} has no {self.context + 1} tokens for a sample: give it more, or make data.context "
                    "smaller"
                )

    def train_dataloader(self) -> StreamLoader:
        """Raises DataError where training would never end."""
        replica = replica_of(self.trainer)
        if self.trainer is not None and self.trainer.max_steps == -1 and self.trainer.limit_train_batches == 1.0:
            raise DataError(f"{_WHAT}: the texts are read again and again, so training has no end: say trainer.max_steps=N")
        if self.source.num_lanes % replica[1]:
            rank_zero_warn(
                f"data.lanes={self.source.num_lanes} are not divided by the {replica[1]} replicas: each reads and tokenizes lanes "
                "of others, too. Use a multiple of the replicas, which for a stream must divide the number of its files"
            )
        read = partial(batches, self.source, self.tokenizer, self.context, self.batch_size, replica, self.format)
        return StreamLoader(read, self.trainer, self.batch_size * replica[1], self.ahead)

    def val_dataloader(self) -> Any:
        if not self.samples:
            return []
        return DataLoader(self.samples, self.batch_size, sampler=Order(self.samples, self.trainer, shuffle=False))  # type: ignore[arg-type]

    def _source(self, given: Any, shuffle: bool, lanes: int) -> Source:
        datasets = need("datasets", _WHAT)
        is_named = isinstance(given, Mapping) and "path" in given  # a DatasetDict is a mapping, too
        dataset = _load(datasets, given) if is_named else given
        if isinstance(dataset, datasets.Dataset):
            return Table(dataset, self.column, shuffle, self.seed, self.block, lanes)
        if isinstance(dataset, datasets.IterableDataset):
            return Stream(dataset, self.column, shuffle, self.seed, self.block, math.gcd(dataset.num_shards, lanes))
        raise DataError(
            f"{_WHAT} got a {type(dataset).__name__}, which is no dataset of texts: name one part of it, as "
            "data.training.split=train"
        )


class Table(Source):
    """A map-style dataset: any row can be read, so that the order is random over all of them.

    Args:
        dataset: a ``datasets.Dataset``.
        column: of the texts.
        shuffle: whether in random order, another one in each turn.
        seed: of it.
        block: rows that are read at once.
        lanes: how many; lane l has rows l, l + lanes, ... of the order.
    """

    def __init__(self, dataset: Any, column: str, shuffle: bool, seed: int, block: int, lanes: int) -> None:
        _check_column(dataset.column_names, column)
        self._dataset, self._column, self._block = dataset.select_columns([column]), column, block
        self._shuffle, self._seed, self.num_lanes = shuffle, seed, lanes

    def read(self, lane: int, turn: int, after: Any) -> Iterator[tuple[list[str], Any]]:
        number = len(self._dataset)
        order = np.random.default_rng([self._seed, turn]).permutation(number) if self._shuffle else np.arange(number)
        own = order[lane :: self.num_lanes].copy()  # and not the whole order for each lane
        for begin in range(after or 0, len(own), self._block):
            end = min(begin + self._block, len(own))
            yield list(self._dataset[own[begin:end].tolist()][self._column]), end


class Stream(Source):
    """A streaming dataset: its files are read from their start, each lane having its own.

    Args:
        dataset: a ``datasets.IterableDataset``; `datasets` says where its reading is.
        column: of the texts.
        shuffle: whether the files are in random order, another one in each turn, and the texts of a block in random order.
        seed: of both.
        block: texts that are read at once.
        lanes: how many; they divide the number of its files.
    """

    def __init__(self, dataset: Any, column: str, shuffle: bool, seed: int, block: int, lanes: int) -> None:
        if dataset.column_names is not None:  # else they are known when the first rows are read
            _check_column(dataset.column_names, column)
        self._dataset, self._column, self._block = dataset, column, block
        self._shuffle, self._seed, self.num_lanes = shuffle, seed, lanes

    def read(self, lane: int, turn: int, after: Any) -> Iterator[tuple[list[str], Any]]:
        number = 0
        part = need("datasets.distributed", _WHAT).split_dataset_by_node(self._dataset, lane, self.num_lanes)
        if self._shuffle:  # datasets puts the files into the order of a generator that is seeded by this
            part.set_epoch(int(np.random.default_rng([self._seed, turn]).integers(1, 1 << 31)))
        if after is not None:
            number, state = after["blocks"], after["state"]
            part.load_state_dict(state)
        for rows in part.iter(self._block):
            _check_column(rows, self._column)
            texts = rows[self._column]
            number += 1
            if self._shuffle:
                mixed = np.random.default_rng([self._seed, turn, lane, number]).permutation(len(texts))
                texts = [texts[row] for row in mixed]
            yield texts, {"blocks": number, "state": part.state_dict()}


def _load(datasets: Any, arguments: Mapping[str, Any]) -> Any:
    try:
        return datasets.load_dataset(**arguments)
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{_WHAT}: datasets.load_dataset({', '.join(f'{key}={value!r}' for key, value in arguments.items())}) says: {error}"
        ) from error


def _check_column(names: Iterable[str], column: str) -> None:
    if column not in names:
        raise DataError(f"data.column={column}: the dataset has the columns {', '.join(names)}: name the one with the texts")


def _first_turn(lane: Lane, count: int, format: str) -> Iterator[Sample]:
    """Samples of a lane until it is at its end."""
    for index in range(count):
        window = torch.from_numpy(lane.take(index).astype(np.int64))
        if lane.place["turn"]:
            return
        yield sample_of_window(window, format)
