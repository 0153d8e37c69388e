"""A table that is replayed with one cost after another: what `simulate` says of the whole, in a fraction of its time.

Actions that wait for nothing of each other are one level, and a level is a few operations on arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lightning_par.pipeline.action import Kind, Table, num_microbatches_of, num_stages_of
from lightning_par.pipeline.simulate import Costs

KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")
_CODES = np.zeros(128, dtype=np.intp)
_CODES[[ord(kind) for kind in KINDS]] = range(len(KINDS))


@dataclass(frozen=True)
class Pace:
    """What a replay says of a table.

    Attributes:
        makespan_seconds: from the first start to the last end.
        exposed_transfer_seconds: see `lightning_par.pipeline.simulate.Timeline`.
    """

    makespan_seconds: float
    exposed_transfer_seconds: tuple[float, ...]

    def prolonged(self, more: Pace, times: float) -> Pace:
        """With ``times`` of what ``more`` takes more."""
        pairs = zip(self.exposed_transfer_seconds, more.exposed_transfer_seconds, strict=True)
        exposed = tuple(mine + times * (its - mine) for mine, its in pairs)
        return Pace(self.makespan_seconds + times * (more.makespan_seconds - self.makespan_seconds), exposed)


class Replay:
    """A table made ready.

    Args:
        table: one row of actions per rank.

    Attributes:
        table: it.
        codes: of each rank its actions, each as ``kind * stages + stage``, the kind's place in `KINDS`.

    Raises:
        AssertionError: the table deadlocks.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        num_stages, num_microbatches = num_stages_of(table), num_microbatches_of(table)
        lengths = [len(row) for row in table]
        columns = [column for row in table for column in zip(*row, strict=True)]
        kind = _CODES[np.frombuffer("".join(map("".join, columns[::3])).encode(), dtype=np.uint8)]
        stage, microbatch = (np.concatenate([np.array(each) for each in columns[place::3]]) for place in (1, 2))
        code = kind * num_stages + stage
        self.codes = np.split(code, np.cumsum(lengths)[:-1])
        rank = np.repeat(np.arange(len(table)), lengths)
        source = _sources(kind, stage, microbatch, num_stages, num_microbatches)
        order, sizes = _levels(source, lengths)
        place = np.empty(len(order) + 1, dtype=np.intp)  # in that order; after all of them one that ended at 0
        place[order], place[-1] = np.arange(len(order)), len(order)
        is_first = np.isin(order, np.cumsum([0, *lengths[:-1]]))
        self._code, self._rank = code[order], rank[order]
        self._source = place[source[order]]
        self._previous = place[np.where(is_first, -1, order - 1)]
        self._crosses = (source[order] >= 0) & (rank[source[order]] != self._rank)
        bounds = np.cumsum([0, *sizes]).tolist()
        self._levels = [(slice(*ends), self._previous[slice(*ends)], self._source[slice(*ends)]) for ends in pairwise(bounds)]

    def run(self, costs: Costs) -> Pace:
        """Replay it.

        Args:
            costs: time of each action.
        """
        by_kind = costs.by_kind()
        seconds = np.array([by_kind[kind] for kind in KINDS]).ravel()[self._code]
        travel = np.where(self._crosses, costs.transfer, 0.0)
        ends = np.zeros(len(seconds) + 1)
        for level, previous, source in self._levels:
            ends[level] = np.maximum(ends[previous], ends[source] + travel[level]) + seconds[level]
        ready, free = ends[self._source], ends[self._previous]
        exposed = np.maximum(0.0, ready + travel - np.maximum(ready, free))
        return Pace(float(ends.max()), tuple(np.bincount(self._rank, exposed, len(self.codes)).tolist()))


def _sources(kind: np.ndarray, stage: np.ndarray, microbatch: np.ndarray, num_stages: int, num_microbatches: int) -> np.ndarray:
    """The place of what each action consumes, see `lightning_par.pipeline.action.source_of`; -1 where that is nothing.

    A weight gradient consumes what its own rank has computed before, so that it waits for nothing.
    """
    is_forward, is_backward = kind == KINDS.index("F"), (kind == KINDS.index("B")) | (kind == KINDS.index("I"))
    forwards, backwards = np.full((2, num_stages, num_microbatches), -1)
    places = np.arange(len(kind))
    forwards[stage[is_forward], microbatch[is_forward]] = places[is_forward]
    backwards[stage[is_backward], microbatch[is_backward]] = places[is_backward]
    source = np.full(len(kind), -1)
    later = is_forward & (stage > 0)
    source[later] = forwards[stage[later] - 1, microbatch[later]]
    last = is_backward & (stage == num_stages - 1)
    source[last] = forwards[stage[last], microbatch[last]]
    inner = is_backward & (stage < num_stages - 1)
    source[inner] = backwards[stage[inner] + 1, microbatch[inner]]
    return source


def _levels(source: np.ndarray, lengths: list[int]) -> tuple[np.ndarray, list[int]]:
    """All actions by level, and how many each has: of every rank the next action, where what it consumes is there."""
    never, total = len(source), len(source)
    needed = np.append(source, never)
    has_ended = np.zeros(total + 2, dtype=bool)
    has_ended[-1] = True  # what nobody computes
    ends = np.cumsum(lengths)
    following = np.arange(1, total + 1)
    following[ends[ends > 0] - 1] = total  # after the last of a rank comes what never can
    position = np.where(np.array(lengths) > 0, ends - lengths, total)
    levels = []
    while True:
        ready = has_ended[needed[position]]
        now = position[ready]
        if not len(now):
            break
        has_ended[now] = True
        position[ready] = following[now]
        levels.append(now)
    assert sum(map(len, levels)) == total, "the schedule deadlocks"
    return np.concatenate(levels), [len(level) for level in levels]
