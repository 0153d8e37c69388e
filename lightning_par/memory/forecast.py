"""What every rank is going to store, before any rank has started.

Model states are counted from the plan; activations are what one microbatch stores on each stage, times the microbatches that the
rank's row of the schedule has in flight. Nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_par.memory.optimizer import OptimizerForm
from lightning_par.memory.profile import Loss, StageMemory, profile_stages
from lightning_par.memory.states import state_bytes
from lightning_par.pipeline.action import Row, Table
from lightning_par.plan import Plan
from lightning_par.plan.memory import RankMemory
from lightning_par.runtime.precision import FULL, Precision
from lightning_par.zero.option import ZeroOptions


def forecast(
    module: nn.Module,
    microbatch: Any,
    plan: Plan,
    table: Table,
    optimizer: OptimizerForm,
    loss_of: Loss,
    splits_backward: bool,
    precision: Precision = FULL,
    options: ZeroOptions | None = None,
) -> tuple[RankMemory, ...]:
    """What a training step stores on every rank. One process, no process group; the module is not changed.

    Args:
        module: the user's module.
        microbatch: one, as large as any.
        plan: all decisions.
        table: the rows of all ranks in a step.
        optimizer: what it keeps.
        loss_of: the loss in what the step returns.
        splits_backward: whether the schedule computes weight gradients apart.
        precision: of the run, as the plan was made for.
        options: the section ``zero``.

    Returns:
        By pp coordinate.

    Raises:
        Exception: whatever the step raises on fake tensors.
    """
    stages = profile_stages(module, microbatch, plan, loss_of, splits_backward, precision)
    found = []
    for pp, row in enumerate(table):
        states = state_bytes(plan, pp, optimizer, options)
        held, peak = peak_bytes(row, stages)
        found.append(RankMemory(states.parameters, states.gradients, states.states, held, peak - held, states.gathered))
    return tuple(found)


def peak_bytes(row: Row, stages: Sequence[StageMemory]) -> tuple[int, int]:
    """The most bytes that a rank's activations have between actions, and at any time, in one step.

    Args:
        row: its actions in order.
        stages: what each does for one microbatch.
    """
    held = most = peak = 0
    for kind, stage, _ in row:
        memory = stages[stage][kind]
        peak = max(peak, held + memory.peak - memory.before)
        held += memory.after - memory.before
        most = max(most, held)
    return most, max(peak, most)
