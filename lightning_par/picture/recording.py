"""From what every rank recorded to a picture: one panel for each batch and replica, on one axis of time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lightning_par.layout import Layout
from lightning_par.picture.bubble import bubbles_of, mean_costs, schedule_bubbles
from lightning_par.picture.picture import Lane, Panel, Picture
from lightning_par.pipeline.action import Action
from lightning_par.pipeline.simulate import Costs, Span


@dataclass(frozen=True)
class Recording:
    """One batch on one rank.

    Attributes:
        step: which batch, such as ``step 5``.
        machine: where the rank ran. The ranks of a machine have one monotonic clock.
        zero_ns: that clock, in nanoseconds, at the zero of the spans.
        spans: its actions.
    """

    step: str
    machine: str
    zero_ns: int
    spans: tuple[Span, ...]


def split_rounds(spans: Iterable[Span]) -> list[tuple[Span, ...]]:
    """The runs of a table in one batch: an optimizer may call its closure again. A new one begins where an action recurs."""
    rounds: list[list[Span]] = []
    seen: set[Action] = set()
    for span in spans:
        if not rounds or span.action in seen:
            rounds.append([])
            seen.clear()
        seen.add(span.action)
        rounds[-1].append(span)
    return [tuple(spans) for spans in rounds]


def picture_of(title: str, layout: Layout, ranks: Sequence[Sequence[Recording]]) -> Picture:
    """The picture of a run.

    Args:
        title: of what.
        layout: of the run, dp resolved.
        ranks: what each recorded, by global rank; all recorded the same batches.
    """
    batches = [_on_one_axis(batch) for batch in zip(*ranks, strict=True)]
    panels: list[Panel] = []
    for batch in batches:
        offset_seconds = (batch[0].zero_ns - batches[0][0].zero_ns) * 1e-9
        replicas = [(dp, tp) for dp in range(layout.dp or 1) for tp in range(layout.tp)]
        panels += [_panel(batch, layout, dp, tp, offset_seconds) for dp, tp in replicas]
    return Picture(title, tuple(panels))


def _on_one_axis(batch: Sequence[Recording]) -> list[Recording]:
    """The same times counted from one zero: of a machine's ranks the earliest.

    The zeros of a machine's ranks differ by how they left the barrier before it, which its clock tells. Between machines the
    barrier is all there is.
    """
    zeros: dict[str, int] = {}
    for recording in batch:
        zeros[recording.machine] = min(recording.zero_ns, zeros.get(recording.machine, recording.zero_ns))
    return [_counted_from(zeros[recording.machine], recording) for recording in batch]


def _counted_from(zero_ns: int, recording: Recording) -> Recording:
    later = (recording.zero_ns - zero_ns) * 1e-9
    spans = (
        replace(span, start_seconds=span.start_seconds + later, end_seconds=span.end_seconds + later) for span in recording.spans
    )
    return replace(recording, zero_ns=zero_ns, spans=tuple(spans))


def _panel(batch: Sequence[Recording], layout: Layout, dp: int, tp: int, offset_seconds: float) -> Panel:
    ranks = [layout.rank_of(pp, dp, tp) for pp in range(layout.pp)]
    rows = [batch[rank].spans for rank in ranks]
    bubbles = {
        "measured": bubbles_of(rows),
        "schedule": schedule_bubbles(rows, mean_costs(rows, layout.num_stages)),
        "equal costs": schedule_bubbles(rows, Costs.equal(layout.num_stages)),
    }
    names = [f"{axis} {at}" for axis, at, size in (("dp", dp, layout.dp or 1), ("tp", tp, layout.tp)) if size > 1]
    lanes = tuple(Lane(f"rank {rank}", rank, row) for rank, row in zip(ranks, rows, strict=True))
    return Panel(batch[0].step, ", ".join(names), lanes, bubbles, offset_seconds)
