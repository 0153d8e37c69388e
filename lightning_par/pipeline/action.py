"""The words of a pipeline schedule: what one stage does with one microbatch, and in which order.

    F2   forward of microbatch 2: receive its activation from the stage before, compute, send to the stage after
    B2   backward of microbatch 2: receive its gradient from the stage after, compute, send to the stage before

A `Table` has one row per stage. The validator, the simulator, the drawings and the executor read the same table, so
that they cannot disagree about what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["F", "B"]


@dataclass(frozen=True)
class Action:
    """One forward or one backward of one microbatch; printed as ``F0`` or ``B3``.

    Attributes:
        kind: ``F`` (forward) or ``B`` (backward).
        microbatch: its index in the batch, from 0.
    """

    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}"

    __repr__ = __str__


Row: TypeAlias = tuple[Action, ...]
Table: TypeAlias = tuple[Row, ...]


def source_of(action: Action, stage: int, num_stages: int) -> tuple[int, Action] | None:
    """The stage and action whose result ``action`` consumes on ``stage``; ``None`` where that is the batch itself."""
    if action.kind == "F":
        return (stage - 1, action) if stage > 0 else None
    return (stage + 1, action) if stage < num_stages - 1 else (stage, Action("F", action.microbatch))
