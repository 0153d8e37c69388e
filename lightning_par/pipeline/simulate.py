"""When every action of a schedule would start and end, given how long each takes.

The model of the machine is the executor's: a rank runs its row in order, a send never blocks, and an action waits until
what it consumes has been computed and, from another rank, has travelled. Tests, the planner and the pictures use it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lightning_par.pipeline.action import Action, Kind, Row, Table, num_microbatches_of, num_stages_of
from lightning_par.pipeline.progress import execution_order, source_keys


@dataclass(frozen=True)
class Costs:
    """Time of each action, in seconds or in any other unit.

    Attributes:
        forward: of F, by stage.
        input_gradient: of I, by stage.
        weight_gradient: of W, by stage. A whole backward takes both.
        transfer: of one activation or gradient from rank to rank.
    """

    forward: Sequence[float]
    input_gradient: Sequence[float]
    weight_gradient: Sequence[float]
    transfer: float = 0.0

    @classmethod
    def equal(
        cls, num_stages: int, forward: float = 1.0, input_gradient: float = 1.0, weight_gradient: float = 1.0, transfer: float = 0.0
    ) -> Costs:
        """The same for every stage."""
        return cls([forward] * num_stages, [input_gradient] * num_stages, [weight_gradient] * num_stages, transfer)

    def by_kind(self) -> dict[Kind, Sequence[float]]:
        """Time of each kind of action, by stage."""
        whole = [i + w for i, w in zip(self.input_gradient, self.weight_gradient, strict=True)]
        return {"F": self.forward, "B": whole, "I": self.input_gradient, "W": self.weight_gradient}


@dataclass(frozen=True, slots=True)
class Span:
    """One action in time, in seconds from the start of the batch.

    Attributes:
        action: what ran.
        start_seconds: when its computation began.
        end_seconds: when its computation ended.
        wait_seconds: how long the rank was idle before, because what the action consumes had not arrived.
    """

    action: Action
    start_seconds: float
    end_seconds: float
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """A schedule in time.

    Attributes:
        rows: spans of each rank, in order.
        peak_in_flight: the most activations each rank holds at once, in microbatches of the rank; see `peak_in_flight`.
        exposed_transfer_seconds: how much of each rank's waiting is for data that has been computed and still travels.
            Empty where it is not known, as in a measured timeline.
    """

    rows: tuple[tuple[Span, ...], ...]
    peak_in_flight: tuple[float, ...]
    exposed_transfer_seconds: tuple[float, ...] = ()

    @property
    def makespan_seconds(self) -> float:
        """From the first start to the last end."""
        return max(row[-1].end_seconds for row in self.rows) - min(row[0].start_seconds for row in self.rows)

    @property
    def idle_fraction(self) -> tuple[float, ...]:
        """Idle share of each rank's time, 0 to 1: 1 - busy / makespan."""
        return tuple(1 - sum(span.end_seconds - span.start_seconds for span in row) / self.makespan_seconds for row in self.rows)

    @property
    def bubble_fraction(self) -> float:
        """Idle share of all ranks' time, 0 to 1: 1 - busy / (ranks x makespan)."""
        return sum(self.idle_fraction) / len(self.rows)


def simulate(table: Table, costs: Costs) -> Timeline:
    """Run ``table`` on imaginary ranks.

    Args:
        table: one row of actions per rank.
        costs: time of each action.

    Raises:
        AssertionError: the table deadlocks; the message shows where each rank stands and what it waits for.
    """
    num_stages, num_microbatches = num_stages_of(table), num_microbatches_of(table)
    seconds = costs.by_kind()
    arrivals: dict[int, tuple[int, float]] = {}  # result: the rank that computed it, and when
    rows: list[list[Span]] = [[] for _ in table]
    free = [0.0] * len(table)
    exposed = [0.0] * len(table)
    for rank in execution_order(table):
        action = table[rank][len(rows[rank])]
        needed, made = source_keys(action, num_stages, num_microbatches)
        was_free = start = free[rank]
        if needed is not None:
            source, ready = arrivals[needed]
            arrival = ready if source == rank else ready + costs.transfer
            if arrival > start:
                start = arrival
                exposed[rank] += arrival - max(ready, was_free)
        end = start + seconds[action.kind][action.stage]
        free[rank] = end
        if made is not None:
            arrivals[made] = (rank, end)
        rows[rank].append(Span(action, start, end, start - was_free))
    return Timeline(tuple(map(tuple, rows)), tuple(map(peak_in_flight, table)), tuple(exposed))


def peak_in_flight(row: Row, released_by: Collection[Kind] = ("B", "W")) -> float:
    """The most activations that a rank holds at once, in microbatches of the rank: one of v stages' counts 1/v.

    A stage holds a microbatch's activations from the start of its F to the end of its B or, the conservative count, of
    its W; of ``released_by=("B", "I")``, to the end of its I. Without a backward it keeps none.
    """
    freed = {(action.stage, action.microbatch) for action in row if action.kind in released_by}
    peak = held = 0
    for action in row:
        if action.kind == "F":
            held += (action.stage, action.microbatch) in freed
            peak = max(peak, held)
        elif action.kind in released_by:
            held -= 1
    return peak / max(1, len({action.stage for action in row}))
