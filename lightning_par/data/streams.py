"""Texts that are tokenized while training reads them, in an order that no layout changes.

The texts are cut into lanes, whose number has nothing to do with that of the ranks. Each lane has its own documents and makes
windows of them, without end: after its last document it begins again, in another order. Sample n of the training, counted over all
replicas, is the next window of lane n modulo the number of lanes. Replica r of d reads samples r, r + d, r + 2d, ...: where d
divides the number of lanes, these are of lanes that no other replica reads.

A lane's place is kept as where its current block of documents begins, and how many windows were given since: to go on there, one
block is read again, and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from lightning_par.data.sample import Sample, sample_of_window
from lightning_par.data.tokenizer import Tokenizer
from lightning_par.errors import DataError

Place = dict[str, Any]  # of a lane; plain data


class Source(ABC):
    """Documents in lanes.

    Attributes:
        num_lanes: how many.
    """

    num_lanes: int

    @abstractmethod
    def read(self, lane: int, turn: int, after: Any) -> Iterator[tuple[list[str], Any]]:
        """Blocks of documents of a lane.

        Args:
            lane: which.
            turn: how often the lane was read to its end before.
            after: what came with the block to go on after; None for the beginning of the turn.

        Yields:
            Documents, and where they end as plain data that is not None.
        """


class Lane:
    """The windows of one lane.

    Args:
        source: of documents.
        number: of the lane.
        tokenizer: for them.
        context: tokens of a sample.
        place: to go on from, as `place` was; None for the beginning.

    Attributes:
        place: after the last window that was taken.
    """

    def __init__(self, source: Source, number: int, tokenizer: Tokenizer, context: int, place: Place | None = None) -> None:
        self._source, self._number, self._tokenizer, self._context = source, number, tokenizer, context
        self.place: Place = place or {"turn": 0, "after": None, "carried": [], "given": 0, "windows": 0}
        self._windows = self._read()

    def take(self, index: int) -> np.ndarray:
        """Window ``index`` of the lane, [context + 1]; those before it are passed over.

        Raises:
            DataError: the lane has no text.
        """
        while self.place["windows"] <= index:
            window = next(self._windows)
        return window

    def _read(self) -> Iterator[np.ndarray]:
        turn, after, windows = self.place["turn"], self.place["after"], self.place["windows"]
        carried, given, context = self.place["carried"], self.place["given"], self._context
        while True:
            is_empty = after is None
            for texts, end in self._source.read(self._number, turn, after):
                tokens = np.concatenate((np.array(carried, np.int64), *self._encoded(texts)))
                count = max(0, len(tokens) - 1) // context
                for number in range(given, count):
                    windows += 1
                    self.place = {"turn": turn, "after": after, "carried": carried, "given": number + 1, "windows": windows}
                    yield tokens[number * context : number * context + context + 1]
                is_empty = is_empty and len(tokens) == len(carried)
                carried, given, after = tokens[count * context :].tolist(), 0, end
            if is_empty:
                raise DataError(f"there is no text in lane {self._number} of {self._source.num_lanes}: use fewer data.lanes")
            turn, after = turn + 1, None

    def _encoded(self, texts: list[str]) -> Iterator[np.ndarray]:
        end = self._tokenizer.end_of_document
        for tokens in self._tokenizer.encode([text for text in texts if text]):
            yield tokens
            if end is not None:
                yield np.array([end])


def batches(
    source: Source,
    tokenizer: Tokenizer,
    context: int,
    batch_size: int,
    replica: tuple[int, int],
    format: str,
    start: int = 0,
    places: dict[int, Place] | None = None,
) -> Iterator[tuple[Sample, dict[int, Place]]]:
    """Batches of one replica, without end.

    Args:
        source, tokenizer, context: as `Lane` takes them.
        batch_size: samples of one replica.
        replica: rank and size, as `replica_of` gives them.
        format: of samples.
        start: samples of all replicas that were used before.
        places: of lanes, at ``start`` or before; lanes without one are read from their beginning.

    Yields:
        A batch, and the places of all lanes that were read after it.
    """
    rank, size = replica
    places = dict(places or {})
    lanes: dict[int, Lane] = {}
    number = start + rank
    while True:
        samples = []
        for _ in range(batch_size):
            index, lane = divmod(number, source.num_lanes)
            if lane not in lanes:
                place = places.get(lane)
                is_before = place is not None and place["windows"] <= index
                lanes[lane] = Lane(source, lane, tokenizer, context, place if is_before else None)
            window = torch.from_numpy(lanes[lane].take(index).astype(np.int64))
            samples.append(sample_of_window(window, format))
            number += size
        places.update((lane, each.place) for lane, each in lanes.items())
        yield default_collate(samples), dict(places)
