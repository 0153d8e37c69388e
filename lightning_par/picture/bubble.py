"""How much of each rank's time is idle: as measured, as the schedule has it with these costs, and with equal ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from lightning_par.pipeline.action import Kind
from lightning_par.pipeline.simulate import Costs, Span, Timeline, simulate

Rows = Sequence[Sequence[Span]]
MEANINGS = {
    "measured": "1 - work / makespan, as it happened",
    "schedule": "the same order of actions, with the mean time of each stage's actions and transfers that take no time",
    "simulated": "the schedule with the costs that were given",
    "equal costs": "the same order of actions, with F, I and W equally long on all stages and transfers that take no time",
}


def bubbles_of(rows: Rows) -> tuple[float, ...]:
    """The idle share of each row, 0 to 1: 1 - busy / makespan, where the makespan is that of all rows."""
    return Timeline(tuple(map(tuple, rows)), ()).idle_fraction


def mean_costs(rows: Rows, num_stages: int) -> Costs:
    """The mean time of each stage's actions. Of a whole backward, half counts for each of its two gradients."""
    times: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for row in rows:
        for span in row:
            seconds, stage = span.end_seconds - span.start_seconds, span.action.stage
            if span.action.kind == "B":
                times["I", stage].append(seconds / 2)
                times["W", stage].append(seconds / 2)
            else:
                times[span.action.kind, stage].append(seconds)

    def means(kind: Kind) -> tuple[float, ...]:
        return tuple(sum(times[kind, stage]) / max(1, len(times[kind, stage])) for stage in range(num_stages))

    return Costs(means("F"), means("I"), means("W"), transfer=0.0)


def schedule_bubbles(rows: Rows, costs: Costs) -> tuple[float, ...]:
    """The idle share of each row if the actions ran in the same order and each took what ``costs`` say."""
    return simulate(tuple(tuple(span.action for span in row) for row in rows), costs).idle_fraction
