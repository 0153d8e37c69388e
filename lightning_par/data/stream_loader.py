"""A training loader of texts that are tokenized as they are read. It goes on anywhere, without reading again what was used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from lightning_par.data.sample import Sample
from lightning_par.data.streams import Place
from lightning_par.host.data.progress import Progress

T = TypeVar("T")
Places = dict[int, Place]
Read = Callable[[int, Places], Iterator[tuple[Sample, Places]]]


@dataclass(frozen=True)
class _Mark:
    """Where the data were after some batches.

    Attributes:
        samples: of all replicas that were used.
        places: of this replica's lanes.
    """

    samples: int
    places: Places


class StreamLoader:
    """Batches without end. The Trainer counts those that were used; the next epoch, or a resumed run, goes on after them.

    Lightning, and our strategy, find `state_dict` and `load_state_dict` by their names.

    Args:
        read: batches after so many samples of all replicas and from such places, as `streams.batches` yields them.
        trainer: counts; None for a process without one, where each iterator begins at the start.
        global_batch: samples of a batch of all replicas.
        ahead: batches that a thread makes while training computes; 0 for no thread.
    """

    def __init__(self, read: Read, trainer: Any, global_batch: int, ahead: int) -> None:
        self._read, self._global_batch, self._ahead = read, global_batch, ahead
        self._progress = None if trainer is None else Progress(trainer)
        self._marks = {0: _Mark(0, {})}  # by the number of batches

    def __iter__(self) -> Iterator[Sample]:
        used, mark = self._used, self._mark
        found = self._read(mark.samples, mark.places)
        for number, (batch, places) in enumerate(ahead_of(found, self._ahead) if self._ahead else found, start=used + 1):
            self._forget()
            self._marks[number] = _Mark(mark.samples + (number - used) * self._global_batch, places)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where training is, as plain data."""
        mark = self._mark
        return {"batches": self._used, "samples": mark.samples, "places": mark.places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next iterator go on where `state_dict` was called, maybe with other replicas or batches of another size."""
        self._marks = {state["batches"]: _Mark(state["samples"], state["places"])}

    @property
    def _used(self) -> int:
        """Batches that training has used; those of an accumulation that has not stepped are not."""
        return 0 if self._progress is None else self._progress.total - self._progress.position.unfinished

    @property
    def _mark(self) -> _Mark:
        """Where the data are now; its places may be from before."""
        used = self._used
        last = max(number for number in self._marks if number <= used)
        mark = self._marks[last]
        return _Mark(mark.samples + (used - last) * self._global_batch, mark.places)

    def _forget(self) -> None:
        """Drop the marks that lie before the last one that is needed."""
        used = self._used
        last = max(number for number in self._marks if number <= used)
        self._marks = {number: mark for number, mark in self._marks.items() if number >= last}


def ahead_of(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items, of which a thread makes up to ``count`` before they are asked for.

    A thread and not a process, as those of a rank cannot be forked safely once it has a process group. It ends with the iterator.
    """
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(count)
    is_over = threading.Event()

    def make() -> None:
        try:
            for item in items:
                if not _put((item, None)):
                    return
        except BaseException as error:  # whatever it is, it is raised where the items are asked for
            _put((None, error))
        else:
            _put((None, StopIteration()))

    def _put(item: tuple[T | None, BaseException | None]) -> bool:
        while not is_over.is_set():
            try:
                made.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    threading.Thread(target=make, daemon=True, name="batches made ahead").start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        is_over.set()
