"""lightning_par beside each peer that does the same work: who is quicker, by how much, and why where it is the peer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.contest import OURS, Row

# Ratios of systems that are equally fast differ by less, from run to run of the same machine.
NOISE = 0.05
# Where a peer is quicker for a reason that is known: by benchmark, work and peer.
REASONS: Mapping[tuple[str, str, str], str] = {}


@dataclass(frozen=True)
class Match:
    """Two systems that do the same work.

    Attributes:
        benchmark: which module has timed them.
        ours: the row of lightning_par.
        theirs: the row of the peer.
    """

    benchmark: str
    ours: Row
    theirs: Row

    @property
    def least(self) -> float:
        """The quickest step of ours, as a multiple of the peer's."""
        return min(self.ours.seconds) / min(self.theirs.seconds)

    @property
    def middle(self) -> float:
        """The median step of ours, as a multiple of the peer's."""
        return median(self.ours.seconds) / median(self.theirs.seconds)

    @property
    def cpu(self) -> float:
        """The least processor time of a step of ours, as a multiple of the peer's."""
        return min(self.ours.cpu_seconds) / min(self.theirs.cpu_seconds)

    @property
    def is_slower(self) -> bool:
        """Whether the quickest and the median step both are slower, by more than noise."""
        return min(self.least, self.middle) > 1 + NOISE

    @property
    def reason(self) -> str:
        """Why the peer is quicker; nothing where it is not."""
        if round(max(self.least, self.middle), 2) <= 1:
            return ""
        known = REASONS.get((self.benchmark, self.ours.work, self.theirs.system))
        return known or ("unknown" if self.is_slower else "within noise")


def matches(benchmark: str, rows: Sequence[Row]) -> list[Match]:
    """Ours beside each other system of the same work, by work."""
    right = [row for row in rows if not row.wrong]
    ours = {row.work: row for row in right if row.system == OURS}
    return [Match(benchmark, ours[work], row) for work in ours for row in right if row.work == work and row.system != OURS]


def losses(found: Iterable[Match]) -> list[str]:
    """One line for each peer that is quicker by more than noise for no reason that is known."""
    return [
        f"{each.benchmark}, {each.ours.work}: a step takes {each.least:.2f} times the quickest of {each.theirs.system}, "
        f"and {each.middle:.2f} times in the median"
        for each in found
        if each.reason == "unknown"
    ]
