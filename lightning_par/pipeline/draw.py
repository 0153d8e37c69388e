"""Schedules as text: one line per stage, one cell per slot of time::

    stage 0  F0 F1 .  .  B0 == .  B1 ==
    stage 1  .  F0 B0 == F1 B1 == .  .

``F0`` is a forward, ``B0 ==`` a backward of two slots, ``.`` an idle slot.
"""

from __future__ import annotations

from lightning_par.pipeline.action import Table
from lightning_par.pipeline.simulate import Span, Timeline, simulate


def draw_table(table: Table, forward_slots: int = 1, backward_slots: int = 1) -> str:
    """Draw a table as it runs on equal stages with free transfers."""
    return draw_timeline(simulate(table, [forward_slots] * len(table), [backward_slots] * len(table)))


def draw_timeline(timeline: Timeline, slot_seconds: float = 1.0) -> str:
    """Draw a timeline; starts and ends are rounded to whole slots of ``slot_seconds``."""
    num_slots = round(timeline.makespan_seconds / slot_seconds)
    rows = [_cells(row, num_slots, slot_seconds) for row in timeline.rows]
    width = max(len(cell) for row in rows for cell in row)
    return "\n".join(f"stage {stage}  {' '.join(cell.ljust(width) for cell in row)}".rstrip() for stage, row in enumerate(rows))


def _cells(row: tuple[Span, ...], num_slots: int, slot_seconds: float) -> list[str]:
    cells = ["."] * num_slots
    for span in row:
        start, end = round(span.start_seconds / slot_seconds), round(span.end_seconds / slot_seconds)
        label = str(span.action)
        cells[start:end] = [label, *["=" * len(label)] * (end - start - 1)][: end - start]
    return cells
