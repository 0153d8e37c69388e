"""Tables by list scheduling: each rank, when it is free, starts the most urgent action that can run.

The rule that a rank follows is a `Policy`. There is no rule that is best for all costs, so `auto` tries several.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from math import inf

from lightning_par.pipeline.action import Action, Kind, Table
from lightning_par.pipeline.schedules.problem import Problem


@dataclass(frozen=True)
class Policy:
    """How a rank chooses.

    Attributes:
        forward_first: whether a forward goes before a backward, as in 1F1B; else after it, as in interleaved zero-bubble.
        later_first: whether of two forwards that of the later stage goes first, as in ZB-V; else the stages take turns
            in rounds of as many microbatches as there are ranks, as in interleaved 1F1B.
        taper: how many forwards fewer than the rank before it each rank runs ahead of its backwards: 0 is as many as the
            memory holds, 1 is as in 1F1B.
        patience: a weight gradient is left for later if more than this share of it would delay something that arrives.
    """

    forward_first: bool
    later_first: bool
    taper: float
    patience: float


def schedule_by_priority(problem: Problem, policy: Policy) -> Table:
    """The table of ranks that follow ``policy``.

    It is complete if ``most_held`` is at least the stages of a rank: a forward leaves room for those of the later stages
    of its rank, so that the earliest microbatch that has not ended can always go on.
    """
    machine = _Machine(problem, policy)
    while machine.events:
        machine.advance()
    return tuple(tuple(row) for row in machine.rows)


class _Machine:
    """The ranks of a pipeline in the middle of a batch."""

    def __init__(self, problem: Problem, policy: Policy) -> None:
        self.problem, self.policy = problem, policy
        self.backward: Kind = problem.kinds[1]
        self.seconds = problem.costs.by_kind()
        stages, ranks = range(problem.num_stages), range(problem.num_ranks)
        never = [inf] * (problem.num_microbatches + 1)  # one more: the next one of a stage that has done all
        self.arrivals: dict[Kind, list[list[float]]] = {kind: [never[:] for _ in stages] for kind in problem.kinds}
        self.arrivals["F"][0][:-1] = [0.0] * problem.num_microbatches
        self.done: dict[Kind, list[int]] = {kind: [0 for _ in stages] for kind in problem.kinds}  # microbatches, by stage
        self.held = [0 for _ in ranks]  # activations, from F to the end of B or W
        self.ahead = [0 for _ in ranks]  # forwards without their B or I
        self.most_ahead = [max(problem.num_chunks, int(problem.most_held - policy.taper * rank)) for rank in ranks]
        self.free = [0.0 for _ in ranks]
        self.rows: list[list[Action]] = [[] for _ in ranks]
        self.events = [(0.0, problem.rank_of[0])]  # when a rank becomes free, or something arrives at it

    def advance(self) -> None:
        """Let one rank choose."""
        now, rank = heapq.heappop(self.events)
        if self.free[rank] > now:
            return
        forward, is_blocked, forward_arrival = self._next_forward(rank, now)
        backward, backward_arrival = self._next_backward(rank, now)
        weight = self._next_weight(rank) if self.problem.splits_backward else None
        arrival = min(forward_arrival, backward_arrival)
        waits = weight is not None and now + self.policy.patience * self.seconds["W"][weight] > arrival
        candidates: list[tuple[Kind, int | None]] = [(self.backward, backward), ("F", forward)]
        if self.policy.forward_first:
            candidates.reverse()
            if is_blocked:  # make room for the forward
                candidates.insert(1, ("W", weight))
        if not waits:
            candidates.append(("W", weight))
        for kind, stage in candidates:
            if stage is not None:
                return self._start(rank, now, kind, stage)
        if arrival < inf:
            heapq.heappush(self.events, (arrival, rank))

    def _next_forward(self, rank: int, now: float) -> tuple[int | None, bool, float]:
        """The stage to run it, whether one is there that the memory has no room for, and when the next one arrives."""
        best, best_turn, is_blocked, next_arrival = None, (inf, inf), False, inf
        room, room_ahead = self.problem.most_held - self.held[rank], self.most_ahead[rank] - self.ahead[rank]
        needed = self.problem.num_chunks + 1
        for stage in self.problem.stages_of[rank]:
            needed -= 1  # for this stage and for the later ones of the rank
            if needed > room_ahead:
                continue
            microbatch = self.done["F"][stage]
            arrival = self.arrivals["F"][stage][microbatch]
            if arrival > now:
                next_arrival = min(next_arrival, arrival) if needed <= room else next_arrival
            elif needed > room:
                is_blocked = True
            else:
                turn = (0, needed) if self.policy.later_first else (microbatch // self.problem.num_ranks, stage)
                if turn < best_turn:
                    best, best_turn = stage, turn
        return best, is_blocked, next_arrival

    def _next_backward(self, rank: int, now: float) -> tuple[int | None, float]:
        """The stage to run it, and when the next one arrives."""
        best, best_round, next_arrival = None, inf, inf
        for stage in reversed(self.problem.stages_of[rank]):
            microbatch = self.done[self.backward][stage]
            arrival = self.arrivals[self.backward][stage][microbatch]
            if arrival > now:
                next_arrival = min(next_arrival, arrival)
            elif microbatch // self.problem.num_ranks < best_round:
                best, best_round = stage, microbatch // self.problem.num_ranks
        return best, next_arrival

    def _next_weight(self, rank: int) -> int | None:
        """The stage whose weight gradient has waited longest, in the order of the backwards."""
        best, best_round = None, inf
        for stage in reversed(self.problem.stages_of[rank]):
            microbatch = self.done["W"][stage]
            if microbatch < self.done["I"][stage] and microbatch // self.problem.num_ranks < best_round:
                best, best_round = stage, microbatch // self.problem.num_ranks
        return best

    def _start(self, rank: int, now: float, kind: Kind, stage: int) -> None:
        microbatch = self.done[kind][stage]
        end = now + self.seconds[kind][stage]
        self.done[kind][stage] += 1
        self.rows[rank].append(Action(kind, stage, microbatch))
        self.free[rank] = end
        heapq.heappush(self.events, (end, rank))
        if kind == "F":
            self.held[rank] += 1
            self.ahead[rank] += 1
            if stage + 1 < self.problem.num_stages:
                self._send("F", stage, stage + 1, microbatch, end)
            else:
                self.arrivals[self.backward][stage][microbatch] = end
        elif kind == self.backward:
            self.ahead[rank] -= 1
            if stage > 0:
                self._send(kind, stage, stage - 1, microbatch, end)
        if kind == self.problem.kinds[-1]:
            self.held[rank] -= 1

    def _send(self, kind: Kind, stage: int, other: int, microbatch: int, end: float) -> None:
        arrival = end + self.problem.transfer_seconds(stage, other)
        self.arrivals[kind][other][microbatch] = arrival
        if self.problem.rank_of[other] != self.problem.rank_of[stage]:
            heapq.heappush(self.events, (arrival, self.problem.rank_of[other]))
