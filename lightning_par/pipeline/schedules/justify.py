"""A table improved by double justification: pushed as far right as it goes, then as far left.

In either direction the actions are placed one by one, in the order in which they began (or, backwards in time, ended),
each as early as its sources, a gap on its rank and the memory allow. None is placed later than it was, so no pass makes
the batch longer; what moves into a gap often makes it shorter (Valls, Ballestin and Quintanilla, "Justification and
RCPSP", European Journal of Operational Research 165, 2005).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

from lightning_par.pipeline.action import Action, Table, source_of
from lightning_par.pipeline.progress import execution_order
from lightning_par.pipeline.schedules.problem import Problem
from lightning_par.pipeline.simulate import simulate

_MOST_ROUNDS = 3
_ROUNDING = 1e-9  # share of an action's time by which a gap may be too short


def justify(problem: Problem, table: Table) -> Table:
    """``table``, or one that is shorter on the same ranks in the same memory.

    Args:
        problem: what the table is for.
        table: runs the problem's kinds of action and holds no more than it allows.
    """
    graph = _Graph.of(problem, table)
    span_of = {span.action: span for row in simulate(table, problem.costs).rows for span in row}
    ends = [span_of[action].end_seconds for action in graph.actions]
    best, shortest = table, max(ends)
    for _ in range(_MOST_ROUNDS):
        # The graph lists actions in an order in which they can run, which decides where two times are equal.
        late_first = sorted(range(len(ends)), key=lambda i: (-ends[i], -i))
        _, before_end = _place(graph, late_first, graph.after, -1)
        first = max(before_end)
        starts = [first - seconds for seconds in before_end]
        early_first = sorted(range(len(starts)), key=lambda i: (starts[i], i))
        starts, ends = _place(graph, early_first, graph.before, 1)
        if max(ends) >= shortest:
            break
        best, shortest = _table(graph, starts, len(table)), max(ends)
    return best


@dataclass
class _Graph:
    """The actions of a table, by number, and what they wait for.

    Attributes:
        actions: in an order in which they can run.
        ranks: where each runs.
        seconds: its time.
        holds: 1 if it begins to hold an activation, -1 if it ends that, else 0.
        before: what it waits for, and the time of the transfer.
        after: what waits for it.
        most_held: how many activations a rank may hold.
    """

    actions: list[Action]
    ranks: list[int]
    seconds: list[float]
    holds: list[int]
    before: list[list[tuple[int, float]]]
    after: list[list[tuple[int, float]]]
    most_held: int

    @classmethod
    def of(cls, problem: Problem, table: Table) -> _Graph:
        rows = [iter(row) for row in table]
        actions = [next(rows[rank]) for rank in execution_order(table)]
        number = {action: i for i, action in enumerate(actions)}
        seconds = problem.costs.by_kind()
        before: list[list[tuple[int, float]]] = [[] for _ in actions]
        after: list[list[tuple[int, float]]] = [[] for _ in actions]
        for i, action in enumerate(actions):
            source = source_of(action, problem.num_stages)
            sources = [] if source is None else [(number[source], problem.transfer_seconds(source.stage, action.stage))]
            if action.microbatch > 0:  # a stage takes its microbatches in order
                sources.append((number[Action(action.kind, action.stage, action.microbatch - 1)], 0.0))
            for j, transfer in sources:
                before[i].append((j, transfer))
                after[j].append((i, transfer))
        return cls(
            actions,
            [problem.rank_of[action.stage] for action in actions],
            [seconds[action.kind][action.stage] for action in actions],
            [(action.kind == "F") - (action.kind == problem.kinds[-1]) for action in actions],
            before,
            after,
            problem.most_held,
        )


def _place(
    graph: _Graph, order: list[int], before: list[list[tuple[int, float]]], direction: int
) -> tuple[list[float], list[float]]:
    """Place each action at the earliest time that is free, on a clock that runs in ``direction``.

    Returns:
        Start and end of each action.
    """
    starts, ends = [0.0] * len(order), [0.0] * len(order)
    ranks = [_RankTime(graph.most_held) for _ in range(1 + max(graph.ranks))]
    for i in order:
        earliest = max((ends[j] + transfer for j, transfer in before[i]), default=0.0)
        starts[i] = ranks[graph.ranks[i]].take(earliest, graph.seconds[i], direction * graph.holds[i])
        ends[i] = starts[i] + graph.seconds[i]
    return starts, ends


class _RankTime:
    """What a rank does when, while actions are placed on it."""

    def __init__(self, most_held: int) -> None:
        self._most_held, self._held = most_held, 0
        self._busy: list[tuple[float, float]] = []
        self._changes: list[tuple[float, int]] = []  # of the activations held: those freed at a time sort before those made

    def take(self, earliest: float, seconds: float, holds: int) -> float:
        """The start of an action of ``seconds`` that is placed at ``earliest`` or at the first time that is free after it."""
        start = max(earliest, self._has_room_from()) if holds > 0 else earliest
        place = bisect_left(self._busy, (start,))
        if place > 0:
            start = max(start, self._busy[place - 1][1])
        while place < len(self._busy) and self._busy[place][0] < start + seconds * (1 - _ROUNDING):
            start = max(start, self._busy[place][1])
            place += 1
        self._busy.insert(place, (start, start + seconds))
        if holds:
            insort(self._changes, (start, 1) if holds > 0 else (start + seconds, -1))
            self._held += holds
        return start

    def _has_room_from(self) -> float:
        """From when on one more activation can be held until the end of what has been placed."""
        held = self._held
        for time, change in reversed(self._changes):
            held -= change
            if held >= self._most_held:
                return time
        return 0.0


def _table(graph: _Graph, starts: list[float], num_ranks: int) -> Table:
    rows: list[list[Action]] = [[] for _ in range(num_ranks)]
    for i in sorted(range(len(starts)), key=lambda i: (starts[i], i)):
        rows[graph.ranks[i]].append(graph.actions[i])
    return tuple(map(tuple, rows))
