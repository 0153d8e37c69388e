"""Random transforms in the workers of a loader, across a resume: each worker draws on where it was.

A worker tells with each batch where its generators are, if they have moved. The process that trains keeps the last of each worker,
and a worker of a resumed run is given them when it starts.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import torch
from torch.utils.data import DataLoader, get_worker_info

from lightning_par.host.data.parts import datasets_of
from lightning_par.runtime.generator_state import States, find_generators, generator_states, restore, restore_generators, states_of


class Told(NamedTuple):
    """What a worker gives for a batch.

    Attributes:
        batch: the batch.
        worker: the number of the worker.
        states: pickled states of its generators; None where they are as before. As bytes they are not pinned with the batch.
    """

    batch: Any
    worker: int
    states: bytes | None


class WorkerDraws:
    """Goes with a loader into its workers.

    Args:
        collate: the loader's ``collate_fn``.
        init: its ``worker_init_fn``.
        states: where each worker is to begin, by its number; where its seed takes it, if it is not there.
    """

    def __init__(self, collate: Callable[[Any], Any], init: Callable[[int], Any] | None, states: dict[int, States]) -> None:
        self._collate, self._init, self._states = collate, init, states
        self._last: Any = None

    def begin(self, worker: int) -> None:
        """In the place of ``worker_init_fn``."""
        if self._init is not None:
            self._init(worker)
        if worker in self._states:
            restore_generators(self._states[worker]["global"])
            restore(_of_dataset(), self._states[worker]["data"])
        self._last = _fingerprint()

    def collate(self, samples: Any) -> Told:
        """In the place of ``collate_fn``."""
        info, batch = get_worker_info(), self._collate(samples)
        assert info is not None
        last, self._last = self._last, _fingerprint()
        if last == self._last:
            return Told(batch, info.id, None)
        return Told(batch, info.id, pickle.dumps({"global": generator_states(), "data": states_of(_of_dataset())}))


class WorkerStates:
    """What the workers of a loader have told, in the process that trains.

    Args:
        num_workers: how many tell; they take turns.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._last: dict[int, States] = {}  # by worker
        self._after: dict[int, States | None] = {}  # of the worker that gave a batch, by the number of the batch in the epoch

    @property
    def last(self) -> dict[int, States]:
        """Where each worker is; none that has not drawn."""
        return dict(self._last)

    @contextmanager
    def begin(self, loader: DataLoader[Any], number: int, states: dict[int, States]) -> Iterator[None]:
        """A pass begins whose iterator is made inside.

        Args:
            loader: the user's.
            number: of its first batch.
            states: where workers begin that are started.
        """
        self._last = dict(states)
        self._after = {number - self._num_workers + worker: states.get(worker) for worker in range(self._num_workers)}
        if not self._num_workers:
            yield
            return
        kept = {"collate_fn": loader.collate_fn, "worker_init_fn": loader.worker_init_fn}
        draws = WorkerDraws(loader.collate_fn, loader.worker_init_fn, states)
        vars(loader).update(collate_fn=draws.collate, worker_init_fn=draws.begin)
        try:
            yield
        finally:
            vars(loader).update(kept)

    def read(self, batches: Iterator[Any], number: int) -> Any:
        """The next batch, which is number ``number``; raises StopIteration at the end."""
        batch = next(batches)
        if not isinstance(batch, Told):
            return batch
        if batch.states is not None:
            self._last[batch.worker] = pickle.loads(batch.states)
        self._after[number] = self._last.get(batch.worker)
        return batch.batch

    def forget(self, number: int) -> None:
        """Forget what is not needed to go on at batch ``number`` or a later one."""
        self._after = {key: states for key, states in self._after.items() if key >= number - 2 * self._num_workers}

    def at(self, number: int) -> dict[int, States]:
        """Where each worker was when all had given the batches before ``number``."""
        after = {worker: self._after.get(number - self._num_workers + worker) for worker in range(self._num_workers)}
        return {worker: states for worker, states in after.items() if states is not None}


def _of_dataset() -> dict[str, Any]:
    info = get_worker_info()
    assert info is not None
    return find_generators(datasets_of(info.dataset))


def _fingerprint() -> Any:
    """Equal where no generator has moved; quicker than to send their states."""
    numbers: Any = numpy.random.get_state()
    own = pickle.dumps(states_of(_of_dataset()))
    return torch.get_rng_state().numpy().tobytes(), numbers[1].tobytes(), numbers[2:], random.getstate(), own
