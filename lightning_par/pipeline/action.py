"""The words of a pipeline schedule: what a rank does with one microbatch on one of its stages, and in which order.

    2F0   forward of microbatch 0 on stage 2: take its activation from stage 1, compute, send to stage 3
    2B0   whole backward: take its gradient from stage 3, compute, send to stage 1
    2I0   the part of the backward that stage 1 waits for: the gradient of the stage's input
    2W0   the part that nobody waits for: the gradients of the stage's weights, later (arXiv 2401.10241, section 2)

Each stage does F, and then B or else I and W, with each microbatch. A `Table` has one row for each pp coordinate, here
called a rank; a rank with several stages calls them its chunks. The validator, the simulator, the drawings and the
executor read the same table, so that they cannot disagree about what runs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """One part of the work of one stage on one microbatch; printed as ``2F0``.

    Attributes:
        kind: ``F`` forward, ``B`` backward, or its halves: ``I`` input gradient, ``W`` weight gradients.
        stage: its number in order of execution, from 0.
        microbatch: its index in the batch, from 0.
    """

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    def __repr__(self) -> str:
        return str(self)


Row: TypeAlias = tuple[Action, ...]
Table: TypeAlias = tuple[Row, ...]


def source_of(action: Action, num_stages: int) -> Action | None:
    """The action whose result ``action`` consumes; ``None`` where that is the batch itself.

    The source of a backward (B or I) is named as an action of its own kind. A table in which the next stage does the
    other kind with this microbatch means that one.
    """
    kind, stage, microbatch = action.kind, action.stage, action.microbatch
    if kind == "F":
        return Action("F", stage - 1, microbatch) if stage > 0 else None
    if kind == "W":
        return Action("I", stage, microbatch)
    return Action(kind, stage + 1, microbatch) if stage < num_stages - 1 else Action("F", stage, microbatch)


def without_split(row: Row) -> Row:
    """A row whose backwards are whole, each where the split one computed its input gradient. What it sends is the same."""
    return tuple(Action("B", *action[1:]) if action.kind == "I" else action for action in row if action.kind != "W")


def num_stages_of(table: Table) -> int:
    """Stages of a table."""
    return 1 + max((action.stage for row in table for action in row), default=-1)


def num_microbatches_of(table: Table) -> int:
    """Microbatches of a table."""
    return 1 + max((action.microbatch for row in table for action in row), default=-1)
