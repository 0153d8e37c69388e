"""Reads a training loader, on from any batch: in the same order, after the batches that were used.

What is kept of a loader is not where its workers are, but where the generators were: when the iterator of the epoch was made (it
draws a seed for the workers), when it drew the first index (a sampler draws its order then), and before each batch that Lightning
has fetched but not used. A resumed loader makes the same order again from them and passes over the batches that were used: in
the order of the indices, so that no sample is loaded for nothing; an IterableDataset, and a loader with an ``__iter__`` of its
own, have to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_par.host.data.evaluation_loader import apart
from lightning_par.host.data.fitting import Manner
from lightning_par.host.data.parts import datasets_of, is_stateful, samplers_of
from lightning_par.host.data.progress import Progress, Start
from lightning_par.host.data.worker_draws import WorkerStates
from lightning_par.runtime.generator import generators_put_back
from lightning_par.runtime.generator_state import (
    States,
    Stream,
    draw_seed,
    find_generators,
    generator_states,
    restore,
    restore_generators,
    states_of,
)


@dataclass
class _Pass:
    """One way through a loader's data: an epoch, or a part of one where a shorter loader begins again for a longer one.

    Attributes:
        start: batches of the epoch before it.
        begin: the generators when its iterator was made.
        first: those when it drew the first index; None before.
        goes_on: whether the run that is resumed had its workers already: no seed is drawn for those that are there.
        workers: where its workers began, by number, if their seed does not say it.
        skipped: batches of it that were used before the run was resumed.
        given: batches of it that were fetched.
        before: the generators before a batch was fetched, by the number of the batch in the epoch; of those not used yet.
        replayed: the same, of the run that is resumed.
    """

    start: int
    begin: States
    first: States | None = None
    goes_on: bool = False
    workers: dict[int, States] = field(default_factory=dict)
    skipped: int = 0
    given: int = 0
    before: dict[int, States] = field(default_factory=dict)
    replayed: dict[int, States] = field(default_factory=dict)


class Reading:
    """Reads one loader, and knows where in its data training is.

    Args:
        loader: the user's.
        progress: of training.
        start: where the run is resumed; the same for all loaders.
        leads: whether this is the first loader, which sets the global generators for all at the beginning of an epoch.
        num_replicas: how many replicas read the data in parts; each takes a batch of its own.
    """

    def __init__(self, loader: DataLoader[Any], progress: Progress, start: Start, leads: bool, num_replicas: int) -> None:
        self._progress, self._start, self._leads = progress, start, leads
        self._loader, self._made = loader, progress.position.epoch
        self._samplers, self._is_map = samplers_of(loader), not isinstance(loader.dataset, IterableDataset)
        self._of_order, self._of_data = find_generators([loader, *self._samplers]), find_generators(datasets_of(loader.dataset))
        is_plain = type(loader).__iter__ is DataLoader.__iter__
        self._is_read = not self._is_map or not is_plain
        self._round = max(1, loader.num_workers)  # batches until a worker has its turn again
        self._is_apart = self._is_read and loader.num_workers == 0
        self._workers = WorkerStates(loader.num_workers if is_plain else 0)
        batch_size = getattr(loader.batch_sampler, "batch_size", None) or 1
        self._manner = Manner(batch_size * num_replicas, type(loader.sampler).__name__)
        self._passes: list[_Pass] = []  # of this epoch, those that have given batches; the last that gave one is last
        self._epoch = -1
        self._opened: _Pass | None = None
        self._waiting: Iterator[Any] | None = None
        self._loaded: dict[str, Any] | None = None

    # ------------------------------------------------------------------ batches

    def open(self, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """The batches of a new pass, whose iterator ``make`` makes."""
        if self._waiting is not None:
            batches, self._waiting = self._waiting, None
            return batches
        passing = self._opened = self._next_pass()
        with self._workers.begin(self._loader, passing.start + self._passed_over(passing), passing.workers):
            iterator = make()
        if self._is_apart:
            iterator = apart(iterator, Stream(draw_seed()))
        with suppress(StopIteration):  # of data that have become fewer
            for number in range(self._passed_over(passing), passing.skipped):
                self._workers.read(iterator, passing.start + number)
        if self._is_resumed and self._progress.position.begins:
            self._start.after = generator_states()
        batches = self._give(iterator, passing)
        if self._is_resumed and passing.start:
            self._waiting = batches  # Lightning is to see an end first: it counts which loaders were read through
            return iter(())
        return batches

    def draw(self, indices: Iterator[Any]) -> Iterator[Any]:
        """The indices of the pass that is being opened; an iterator with workers asks twice and reads the second."""
        assert self._opened is not None
        return self._draw(indices, self._opened)

    @property
    def _is_resumed(self) -> bool:
        return self._loaded is not None and self._start.is_fresh

    def _next_pass(self) -> _Pass:
        if not self._is_resumed:
            same_epoch = self._passes and self._epoch == self._progress.position.epoch
            last = self._passes[-1] if same_epoch else None
            start = 0 if last is None else last.start + last.skipped + last.given
            return _Pass(start, self._states(), workers=self._workers.last if self._loader.persistent_workers else {})
        assert self._loaded is not None
        position, kept = self._loaded["position"], self._loaded["pass"]
        for sampler in self._samplers:  # Lightning does so only after the first iterator of a resumed run was made
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(position["epoch"])
        if kept is None:
            self._restore({"global": self._start.generators if self._leads else None, **self._loaded["now"]})
            return _Pass(0, self._states(), goes_on=self._loaded["has_workers"], workers=self._loaded["workers"])
        self._restore(kept["begin"])
        if not self._is_read:  # the data are where they were when the checkpoint was saved, without being read
            self._restore({"data": self._loaded["now"]["data"]})
        passing = _Pass(kept["start"], kept["begin"], kept["first"], workers=kept["workers"], replayed=dict(kept["before"]))
        passing.skipped = position["batches"] - passing.start
        return passing

    def _draw(self, indices: Iterator[Any], passing: _Pass) -> Iterator[Any]:
        if passing.first is None:
            if passing.goes_on:
                self._restore({key: passing.begin[key] for key in ("global", "order")})
            passing.first = self._states()
        elif self._is_apart:
            self._restore({"order": passing.first["order"]})
        elif self._is_read:
            self._restore({key: passing.first[key] for key in ("global", "order")})
        else:
            with generators_put_back():
                self._restore({key: passing.first[key] for key in ("global", "order")})
                passed_over = self._passed_over(passing)
                next(islice(indices, passed_over, passed_over), None)
        yield from indices

    def _passed_over(self, passing: _Pass) -> int:
        """Batches of a resumed pass that need not be read. Those of a round of workers are: each gets its own again."""
        return 0 if self._is_read else passing.skipped - passing.skipped % self._round

    def _give(self, iterator: Iterator[Any], passing: _Pass) -> Iterator[Any]:
        for number in count(passing.start + passing.skipped):
            if number in passing.replayed:
                self._restore(passing.replayed.pop(number))
            used = self._progress.position.batches
            passing.before = {key: states for key, states in passing.before.items() if key >= used}
            passing.before[number] = {"global": generator_states(), "data": states_of(self._of_data)}
            self._workers.forget(used)
            try:
                batch = self._workers.read(iterator, number)
            except StopIteration:
                del passing.before[number]
                self._loaded = None  # its pass is over: where it was shorter than others, the next begins anew
                self._note(passing)
                return
            passing.given += 1
            self._note(passing)
            yield batch

    def _note(self, passing: _Pass) -> None:
        epoch = self._progress.position.epoch
        others = [each for each in self._passes if each is not passing] if epoch == self._epoch else []
        self._passes, self._epoch = [*others[-1:], passing], epoch

    # ------------------------------------------------------------------ states

    def state_dict(self) -> dict[str, Any]:
        """Where training is in the data, as plain data."""
        position = self._progress.position
        passes = self._passes if self._epoch == position.epoch else []
        passing = next((each for each in reversed(passes) if each.start <= position.batches), self._opened)
        kept = None
        if not position.begins and passing is not None:
            before = {**passing.replayed, **passing.before}
            used = position.batches - passing.start
            kept = {
                "start": passing.start,
                "begin": passing.begin,
                "first": passing.first,
                "workers": passing.workers if self._is_read else self._workers.at(position.batches - used % self._round),
                "before": {number: states for number, states in before.items() if number >= position.batches},
            }
        is_kept = not self._progress.is_reloaded_after(self._made)
        own = {key: states for key, states in self._states().items() if key != "global" and is_kept}
        has_workers = self._loader.persistent_workers and self._opened is not None and is_kept
        return {
            "position": asdict(position),
            **asdict(self._manner),
            "has_workers": has_workers,
            "workers": self._workers.last if has_workers else {},
            "now": own,
            "pass": kept,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next pass begin where `state_dict` was called. Lightning may ask again for the same."""
        fitting = self._manner.fit(state)
        if self._loaded is None and not fitting["position"]["begins"]:
            batches = fitting["position"]["batches"]
            self._manner.warn(state, batches)
            if self._leads:
                self._progress.move(batches - state["position"]["batches"])
        self._loaded = fitting

    def _states(self) -> States:
        samplers = [sampler.state_dict() for sampler in self._samplers if is_stateful(sampler)]
        order, data = states_of(self._of_order), states_of(self._of_data)
        return {"global": generator_states(), "samplers": samplers, "order": order, "data": data}

    def _restore(self, states: States) -> None:
        if states.get("global") is not None:
            restore_generators(states["global"])
        for sampler, state in zip(filter(is_stateful, self._samplers), states.get("samplers", []), strict=False):
            sampler.load_state_dict(state)
        restore(self._of_order, states.get("order", {}))
        restore(self._of_data, states.get("data", {}))
