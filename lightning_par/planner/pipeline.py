"""How long pipelines take and what their ranks hold: tables of schedules, each built once and replayed with many costs.

Of many microbatches the middle ones repeat: the table is replayed with a few and with a few more, and the rest follows. With one
stage on each rank, all equal but for the ends, that is exact, however slow the links are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_par.layout import Layout
from lightning_par.memory.profile import StageMemory
from lightning_par.pipeline.action import Table
from lightning_par.pipeline.replay import KINDS, Pace, Replay
from lightning_par.pipeline.schedules import SCHEDULES, build_schedule
from lightning_par.pipeline.simulate import Costs

_ROUNDS, _MORE_ROUNDS = 2, 3  # so many microbatches for each rank are replayed, and with several stages on it
_ROUNDING = 1e-9  # share by which sums in another order may differ
Sizes = tuple[str, int, int]  # a schedule, ranks, stages on each


class Pipelines:
    """Replays tables, and remembers."""

    def __init__(self) -> None:
        self._replays: dict[tuple[Sizes, int], Replay] = {}
        self._stages: dict[Sizes, np.ndarray] = {}
        # by the costs' identity, which costs less than to compare them; they are kept, so that no others get it
        self._paces: dict[tuple[Sizes, int, int], tuple[Costs, Pace]] = {}
        self._ways: dict[tuple[Sizes, int], tuple[Costs, _Ways]] = {}

    def table(self, sizes: Sizes, count: int) -> Table:
        """What is replayed of ``count`` microbatches."""
        return self._replay(sizes, _few(sizes, count)).table

    def pace(self, sizes: Sizes, count: int, costs: Costs) -> Pace:
        """How long ``count`` microbatches take."""
        few = _few(sizes, count)
        pace = self._run(sizes, few, costs)
        if few == count:
            return pace
        period = sizes[1]  # with slow links fewer come back from the last stage together
        return pace.prolonged(self._run(sizes, few + period, costs), (count - few) / period)

    def least_seconds(self, sizes: Sizes, count: int, costs: Costs) -> float:
        """What a replay does not fall below.

        A rank begins when the first microbatch has come through the stages before its own first one. After its last action the
        gradient has to go back through these; where weight gradients are computed apart, after its last input gradient.
        """
        key = sizes, id(costs)
        if key not in self._ways:
            self._ways[key] = costs, _Ways.of(self._stages_of(sizes), costs)
        (_, ways), is_split = self._ways[key], SCHEDULES[sizes[0]].splits_backward
        weights = count * ways.weights
        after = np.maximum(ways.back, weights) if is_split else ways.back + ways.back_weights + weights
        return (1 - _ROUNDING) * float((ways.there + count * ways.passed + after).max())

    def peaks(self, sizes: Sizes, count: int, stages: Sequence[StageMemory]) -> list[tuple[int, int]]:
        """Of each rank what `lightning_par.memory.forecast.peak_bytes` says."""
        change, rise = (
            np.array([[getattr(stage[kind], name) - stage[kind].before for stage in stages] for kind in KINDS]).ravel()
            for name in ("after", "peak")
        )
        found = []
        for codes in self._replay(sizes, _few(sizes, count)).codes:
            changes = change[codes]
            after = np.cumsum(changes)
            held = max(0, int(after.max()))
            found.append((held, max(held, int((after - changes + rise[codes]).max()))))
        return found

    def _run(self, sizes: Sizes, count: int, costs: Costs) -> Pace:
        key = sizes, count, id(costs)
        if key not in self._paces:
            self._paces[key] = costs, self._replay(sizes, count).run(costs)
        return self._paces[key][1]

    def _stages_of(self, sizes: Sizes) -> np.ndarray:
        """The stages of each rank, a row each; the first one has the rank's number."""
        if sizes not in self._stages:
            schedule, pp, vp = sizes
            layout = Layout(pp=pp, vp=vp, placement=SCHEDULES[schedule].placement)
            self._stages[sizes] = np.array([layout.stages_of(rank) for rank in range(pp)])
        return self._stages[sizes]

    def _replay(self, sizes: Sizes, count: int) -> Replay:
        if (sizes, count) not in self._replays:
            self._replays[sizes, count] = Replay(build_schedule(*sizes, count))
        return self._replays[sizes, count]


@dataclass(frozen=True)
class _Ways:
    """Seconds of one microbatch, by rank.

    Attributes:
        passed, weights: on the rank's stages, forward and input gradient, and weight gradient.
        there, back: through the stages before its first one, forward, and input gradient, with what travels.
        back_weights: of weight gradients on the way back.
    """

    passed: np.ndarray
    weights: np.ndarray
    there: np.ndarray
    back: np.ndarray
    back_weights: np.ndarray

    @classmethod
    def of(cls, stages: np.ndarray, costs: Costs) -> _Ways:
        pp = len(stages)
        seconds = np.array([costs.forward, costs.input_gradient, costs.weight_gradient])
        before = np.zeros((3, pp))
        np.cumsum(seconds[:, : pp - 1], axis=1, out=before[:, 1:])
        travel = costs.transfer * np.arange(pp)
        forward, inputs, weights = seconds[:, stages].sum(axis=2)
        return cls(forward + inputs, weights, before[0] + travel, before[1] + travel, before[2])


def _few(sizes: Sizes, count: int) -> int:
    """Microbatches that are replayed: a multiple of the ranks, or all."""
    schedule, pp, vp = sizes
    if schedule == "gpipe":  # which holds the activations of all
        return count
    return min(count, (_ROUNDS if vp == 1 else _MORE_ROUNDS) * pp)
