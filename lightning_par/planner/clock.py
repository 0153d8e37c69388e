"""Seconds of actions on a cluster: as measured, and by the datasheet where nothing was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_par.planner.cluster import Cluster
from lightning_par.planner.work import Line


class Clock:
    """Knows how long actions take.

    Where some are measured and others are not, the datasheet's seconds of the others are multiplied by what the measured ones of
    the whole module take of theirs: no way to run is better than another only because nobody has measured it.

    Args:
        cluster: whose devices compute.
        whole: gives the actions of the module on one device, none of it computed again.

    Attributes:
        device: of the cluster, with its datasheet.
    """

    def __init__(self, cluster: Cluster, whole: Callable[[], Sequence[Line]]) -> None:
        self.device = cluster.device
        self._calibration, self._whole = cluster.calibration, whole
        self._factors: dict[int, float] = {}
        self._asked: dict[str, bool] = {}

    @property
    def coverage(self) -> tuple[int, int]:
        """Of the actions that it was asked for, how many different ones were measured, and how many there are."""
        return sum(self._asked.values()), len(self._asked)

    def pace(self, line: Line, rows: int) -> float:
        """How many times longer than by the datasheet an action takes with so many rows."""
        if self._calibration is None:
            return 1.0
        measured, foretold = self._calibration.seconds(line.digest, rows), line.seconds(rows, self.device)
        self._asked[line.digest] = measured is not None
        return self._factor(rows) if measured is None or not foretold else measured / foretold

    def _factor(self, rows: int) -> float:
        if rows not in self._factors:
            assert self._calibration is not None
            pairs = [(self._calibration.seconds(line.digest, rows), line) for line in self._whole()]
            measured = sum(seconds for seconds, _ in pairs if seconds is not None)
            foretold = sum(line.seconds(rows, self.device) for seconds, line in pairs if seconds is not None)
            self._factors[rows] = measured / foretold if foretold else 1.0
        return self._factors[rows]
