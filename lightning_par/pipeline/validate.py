"""Proof that a schedule can run: every table passes here before a process executes it.

It is not asked in which order two ranks exchange messages: over gloo each has a tag of its own (stage, microbatch), so a
receiver may take them in another order than the sender sends them. NCCL has no tags: there `keeps_order` must hold.
"""

from __future__ import annotations

from lightning_par.pipeline.action import Action, Table, num_microbatches_of, num_stages_of
from lightning_par.pipeline.progress import execution_order

_ORDERS = {
    "F": "F",
    "B and I": "BI",
    "B and W": "BW",  # gradients are summed in the same order, to the same bits, under every schedule
}


def check_table(table: Table, forward_only: bool = False) -> None:
    """Check that a table is complete, ordered and free of deadlock.

    Args:
        table: one row of actions per rank.
        forward_only: whether it is for evaluation, F alone; else each stage does F, and B or else I and W, with each
            microbatch.

    Raises:
        AssertionError: names the rank and the action, and shows the table.
    """
    assert num_microbatches_of(table) > 0, "the schedule is empty"
    _check_ranks(table)
    for rank in range(len(table)):
        _check_row(table, rank, forward_only)
    execution_order(table)


def keeps_order(table: Table) -> bool:
    """Whether every rank takes the messages of another in the order in which that one sends them, activations and gradients apart.

    So it is in every named schedule.
    """
    owner = {action.stage: rank for rank, row in enumerate(table) for action in row}
    sent, taken = _Messages(), _Messages()
    for rank, row in enumerate(table):
        for action in row:
            kind = "F" if action.kind == "F" else "B"
            step = 1 if kind == "F" else -1  # to the stage that comes next for this kind
            if action.kind != "W":
                sent.note(kind, rank, owner.get(action.stage + step, rank), action.stage + step, action.microbatch)
                taken.note(kind, owner.get(action.stage - step, rank), rank, action.stage, action.microbatch)
    return sent.by_channel == taken.by_channel


class _Messages:
    """Messages between ranks, in order: the stage that takes each, and the microbatch."""

    def __init__(self) -> None:
        self.by_channel: dict[tuple[str, int, int], list[tuple[int, int]]] = {}

    def note(self, kind: str, sender: int, receiver: int, stage: int, microbatch: int) -> None:
        if sender != receiver:
            self.by_channel.setdefault((kind, sender, receiver), []).append((stage, microbatch))


def _check_ranks(table: Table) -> None:
    """Every stage belongs to one rank."""
    owner: dict[int, int] = {}
    for rank, row in enumerate(table):
        for stage in {action.stage for action in row}:
            assert owner.setdefault(stage, rank) == rank, _explain(table, f"ranks {owner[stage]} and {rank} both run stage {stage}")
    missing = [stage for stage in range(num_stages_of(table)) if stage not in owner]
    assert not missing, _explain(table, f"no rank runs stage {', '.join(map(str, missing))}")


def _check_row(table: Table, rank: int, forward_only: bool) -> None:
    num_microbatches = num_microbatches_of(table)
    done: dict[tuple[int, int], str] = {}  # stage and microbatch: kinds so far
    last: dict[tuple[str, int], int] = {}  # name of an order, and stage: the latest microbatch
    follows = {"": "F"} if forward_only else {"": "F", "F": "BI", "FI": "W"}
    for action in table[rank]:
        place = action.stage, action.microbatch
        before = done.get(place, "")
        if action.kind not in follows.get(before, ""):
            raise AssertionError(_explain(table, f"rank {rank} {_misplaced(action, before, forward_only)}"))
        done[place] = before + action.kind
        for name, kinds in _ORDERS.items():
            if action.kind in kinds:
                assert last.get((name, action.stage), -1) < action.microbatch, _explain(
                    table, f"rank {rank} runs {action} out of turn: {name} of a stage go from the first microbatch to the last"
                )
                last[name, action.stage] = action.microbatch
    whole = ("F",) if forward_only else ("FB", "FIW")
    for stage in sorted({action.stage for action in table[rank]}):
        for microbatch in range(num_microbatches):
            before = done.get((stage, microbatch), "")
            if before not in whole:
                missing = {"": "F", "F": "B", "FI": "W"}[before]
                raise AssertionError(_explain(table, f"rank {rank} never runs {stage}{missing}{microbatch}"))


def _misplaced(action: Action, before: str, forward_only: bool) -> str:
    """What is wrong with an action after the kinds ``before`` of its stage and microbatch."""
    if forward_only and action.kind != "F":
        return f"must not run {action}: evaluation has no backward"
    if action.kind in before:
        return f"runs {action} more than once"
    if "B" in before or (action.kind == "B" and "I" in before):
        return f"runs {action} beside {action.stage}{before[1]}{action.microbatch}: a backward is B, or I and W"
    needed = "I" if action.kind == "W" else "F"
    return f"runs {action} before {action.stage}{needed}{action.microbatch}"


def _explain(table: Table, problem: str) -> str:
    rows = "\n".join(f"rank {rank}  {' '.join(map(str, row))}" for rank, row in enumerate(table))
    return f"{problem}:\n{rows}"
