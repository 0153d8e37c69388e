"""Validation inside of training, which moves the global generators by one number for each loader, whatever it does.

So much a DataLoader of stock Lightning draws, for the seed of its workers. What else loaders and their data draw, and whether
workers are started or still there, differs between a run that goes on and one that is resumed: it must not change what training
draws next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from lightning_par.host.data.progress import Start
from lightning_par.host.data.twin import twin_of
from lightning_par.runtime.generator_state import Stream


class EvaluationLoader:
    """What `keep_apart` adds to a DataLoader."""

    __slots__ = ("start",)
    start: Start

    def __iter__(self) -> Iterator[Any]:
        stream = Stream(self.start.draw_for_evaluation())
        with stream.drawn():
            batches = super().__iter__()  # type: ignore[misc]
        return apart(batches, stream)


def keep_apart(loader: DataLoader[Any], start: Start) -> DataLoader[Any]:
    """A loader that draws from a stream of its own.

    Args:
        loader: the user's, which stays what it is.
        start: where the run is resumed.
    """
    twin: Any = twin_of(loader, EvaluationLoader)
    twin.start = start
    return twin


def apart(batches: Iterator[Any], stream: Stream) -> Iterator[Any]:
    """Batches whose data draw from ``stream`` where they are read in this process."""
    while True:
        with stream.drawn():
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch
