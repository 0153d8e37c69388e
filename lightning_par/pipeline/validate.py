"""Proof that a schedule can run: every table passes here before a process executes it."""

from __future__ import annotations

from lightning_par.pipeline.action import Action, Kind, Row, Table
from lightning_par.pipeline.simulate import simulate


def check_table(table: Table, kinds: tuple[Kind, ...] = ("F", "B")) -> None:
    """Check that a table is complete, ordered and free of deadlock.

    Args:
        table: one row of actions per stage.
        kinds: what every stage must do with every microbatch; ``("F",)`` for a forward-only table.

    Raises:
        AssertionError: names the stage and the action, and shows the table.
    """
    num_microbatches = 1 + max((action.microbatch for row in table for action in row), default=-1)
    assert num_microbatches > 0, "the schedule is empty"
    wanted = {Action(kind, microbatch) for kind in kinds for microbatch in range(num_microbatches)}
    for stage, row in enumerate(table):
        _check_complete(table, stage, wanted)
        _check_order(table, stage)
        for kind in kinds:  # a channel between neighbours delivers in order and has no tags
            assert _microbatches(row, kind) == _microbatches(table[0], kind), _explain(
                table, f"stage {stage} takes its {kind} in another order than stage 0"
            )
    slots = [1.0] * len(table)
    simulate(table, slots, slots)


def _check_complete(table: Table, stage: int, wanted: set[Action]) -> None:
    row = table[stage]
    missing = sorted(wanted - set(row), key=str)
    assert not missing, _explain(table, f"stage {stage} never runs {', '.join(map(str, missing))}")
    foreign = sorted(set(row) - wanted, key=str)
    assert not foreign, _explain(table, f"stage {stage} must not run {', '.join(map(str, foreign))}")
    repeated = sorted({action for action in row if row.count(action) > 1}, key=str) if len(row) > len(wanted) else []
    assert not repeated, _explain(table, f"stage {stage} runs {', '.join(map(str, repeated))} more than once")


def _check_order(table: Table, stage: int) -> None:
    forwarded = set()
    for action in table[stage]:
        if action.kind == "F":
            forwarded.add(action.microbatch)
        assert action.microbatch in forwarded, _explain(table, f"stage {stage} runs {action} before F{action.microbatch}")


def _microbatches(row: Row, kind: Kind) -> list[int]:
    return [action.microbatch for action in row if action.kind == kind]


def _explain(table: Table, problem: str) -> str:
    rows = "\n".join(f"stage {stage}  {' '.join(map(str, row))}" for stage, row in enumerate(table))
    return f"{problem}:\n{rows}"
