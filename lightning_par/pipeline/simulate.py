"""When every action of a schedule would start and end, given how long each takes.

The model of the machine is the executor's: a stage runs its row in order, a send never blocks, a receive blocks until
the neighbour's action has ended and its result has travelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_par.pipeline.action import Action, Row, Table, source_of


@dataclass(frozen=True)
class Span:
    """One action in time, in seconds from the start of the batch."""

    action: Action
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Timeline:
    """A schedule in time.

    Attributes:
        rows: spans of each stage, in order.
        peak_in_flight: most microbatches whose activations each stage holds at once.
    """

    rows: tuple[tuple[Span, ...], ...]
    peak_in_flight: tuple[int, ...]

    @property
    def makespan_seconds(self) -> float:
        """From the first start to the last end."""
        return max(row[-1].end_seconds for row in self.rows)

    @property
    def bubble_fraction(self) -> float:
        """Idle share of all stages' time, 0 to 1: 1 - busy / (stages x makespan)."""
        busy_seconds = sum(span.end_seconds - span.start_seconds for row in self.rows for span in row)
        return 1 - busy_seconds / (len(self.rows) * self.makespan_seconds)


def simulate(
    table: Table, forward_seconds: Sequence[float], backward_seconds: Sequence[float], transfer_seconds: float = 0.0
) -> Timeline:
    """Run ``table`` on imaginary stages.

    Args:
        table: one row of actions per stage.
        forward_seconds: time of one forward, by stage.
        backward_seconds: time of one backward, by stage.
        transfer_seconds: time of one activation or gradient between neighbours.

    Raises:
        AssertionError: the table deadlocks; the message shows where each stage stands and what it waits for.
    """
    num_stages = len(table)
    seconds = {"F": forward_seconds, "B": backward_seconds}
    ends: dict[tuple[int, Action], float] = {}
    rows: list[list[Span]] = [[] for _ in table]
    progress = True
    while progress:  # one sweep runs each stage as far as it gets
        progress = False
        for stage, row in enumerate(table):
            for action in row[len(rows[stage]) :]:
                source = source_of(action, stage, num_stages)
                if source is not None and source not in ends:
                    break
                arrival = 0.0 if source is None else ends[source] + (transfer_seconds if source[0] != stage else 0.0)
                start = max(arrival, rows[stage][-1].end_seconds if rows[stage] else 0.0)
                ends[stage, action] = start + seconds[action.kind][stage]
                rows[stage].append(Span(action, start, ends[stage, action]))
                progress = True
    num_done = [len(row) for row in rows]
    assert num_done == [len(row) for row in table], f"the schedule deadlocks:\n{_draw_stuck(table, num_done)}"
    return Timeline(tuple(map(tuple, rows)), tuple(map(_peak_in_flight, table)))


def _peak_in_flight(row: Row) -> int:
    """A stage holds a microbatch's activations from the start of its F to the end of its B; without a B it keeps none."""
    kept = {action.microbatch for action in row if action.kind == "B"}
    peak = held = 0
    for action in row:
        if action.microbatch in kept:
            held += 1 if action.kind == "F" else -1
            peak = max(peak, held)
    return peak


def _draw_stuck(table: Table, num_done: list[int]) -> str:
    lines = []
    for stage, (row, done) in enumerate(zip(table, num_done, strict=True)):
        cells = [f"[{action}]" if i == done else str(action) for i, action in enumerate(row)]
        source = source_of(row[done], stage, len(table)) if done < len(row) else None
        waits = f"   waits for {source[1]} of stage {source[0]}" if source else "   ended"
        lines.append(f"stage {stage}  {' '.join(cells)}{waits}")
    return "\n".join(lines)
