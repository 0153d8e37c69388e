"""Schedules as text: one line per rank, one cell per slot of time::

    rank 0  F0 F1 .  .  B0 == .  B1 ==
    rank 1  .  F0 B0 == F1 B1 == .  .

``F0`` is a forward of microbatch 0, ``B0 ==`` a backward of two slots, ``I0`` and ``W0`` its halves, ``.`` an idle
slot. A rank with several stages says which by a letter: ``F0a`` on the first of its stages, ``F0b`` on the second.
"""

from __future__ import annotations

from string import ascii_lowercase

from lightning_par.pipeline.action import Table, num_stages_of
from lightning_par.pipeline.simulate import Costs, Span, Timeline, simulate


def draw_table(table: Table, costs: Costs | None = None) -> str:
    """Draw a table as it runs with ``costs`` in slots; by default every action takes one slot, and a transfer none."""
    if costs is None:
        half = 1.0 if any(action.kind == "I" for row in table for action in row) else 0.5
        costs = Costs.equal(num_stages_of(table), input_gradient=half, weight_gradient=half)
    return draw_timeline(simulate(table, costs))


def draw_timeline(timeline: Timeline, slot_seconds: float = 1.0) -> str:
    """Draw a timeline; starts and ends are rounded to whole slots of ``slot_seconds``."""
    num_slots = round(timeline.makespan_seconds / slot_seconds)
    rows = [_cells(row, num_slots, slot_seconds) for row in timeline.rows]
    width = max(len(cell) for row in rows for cell in row)
    return "\n".join(f"rank {rank}  {' '.join(cell.ljust(width) for cell in row)}".rstrip() for rank, row in enumerate(rows))


def _cells(row: tuple[Span, ...], num_slots: int, slot_seconds: float) -> list[str]:
    cells = ["."] * num_slots
    stages = sorted({span.action.stage for span in row})
    letters = dict(zip(stages, ascii_lowercase if len(stages) > 1 else [""], strict=False))
    for span in row:
        start, end = round(span.start_seconds / slot_seconds), round(span.end_seconds / slot_seconds)
        label = f"{span.action.kind}{span.action.microbatch}{letters[span.action.stage]}"
        cells[start:end] = [label, *["=" * len(label)] * (end - start - 1)][: end - start]
    return cells
