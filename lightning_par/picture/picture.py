"""What a picture of a pipeline shows: rows of actions in time, and the share of each row's time that is idle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lightning_par.pipeline.simulate import Span


@dataclass(frozen=True)
class Lane:
    """What one rank did.

    Attributes:
        label: how the picture names it, such as ``rank 3``.
        rank: global rank.
        spans: its actions, in order.
    """

    label: str
    rank: int
    spans: tuple[Span, ...]

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """The stages that the rank runs, ascending."""
        return tuple(sorted({span.action.stage for span in self.spans}))


@dataclass(frozen=True)
class Panel:
    """One batch on the ranks of one pipeline.

    Attributes:
        step: which batch, such as ``step 5``.
        replica: whose, such as ``dp 0, tp 0``.
        lanes: one for each pp coordinate.
        bubbles: idle share of each lane's time, 0 to 1, under names of `bubble.MEANINGS`.
        offset_seconds: from the zero of the first panel to this one's.
    """

    step: str
    replica: str
    lanes: tuple[Lane, ...]
    bubbles: Mapping[str, Sequence[float]] = field(default_factory=dict)
    offset_seconds: float = 0.0

    @cached_property
    def limits(self) -> tuple[float, float]:
        """From the first start to the last end, in seconds; what a rank waits for before its first start is outside."""
        return min(lane.spans[0].start_seconds for lane in self.lanes), max(lane.spans[-1].end_seconds for lane in self.lanes)


@dataclass(frozen=True)
class Picture:
    """All that is drawn.

    Attributes:
        title: of what.
        panels: at least one; a picture that cannot show all shows the first.
        has_seconds: whether times are seconds; else they are in a unit of the user's own.
    """

    title: str
    panels: tuple[Panel, ...]
    has_seconds: bool = True


def format_time(seconds: float, has_seconds: bool = True, longest: float | None = None) -> str:
    """Four digits and a unit: ``12.5 ms``.

    Args:
        seconds: what is written.
        has_seconds: without it, times are in another unit, and only the number is written.
        longest: of several times that are to have one unit; by default this one.
    """
    if not has_seconds:
        return f"{seconds:.4g}"
    longest = seconds if longest is None else longest
    factor, unit = (1.0, "s") if longest >= 1 else (1e-3, "ms") if longest >= 1e-3 else (1e-6, "µs")
    return f"{seconds / factor:.4g} {unit}"
