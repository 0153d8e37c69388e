"""Forward only: what evaluation runs."""

from __future__ import annotations

from lightning_par.layout import Placement, pp_of_stage
from lightning_par.pipeline.action import Action, Table


def forward_only(num_ranks: int, num_chunks: int, num_microbatches: int, placement: Placement = "loop") -> Table:
    """Every forward in turn, for evaluation and prediction.

    For p = 4 ranks, one stage on each, and m = 4 microbatches::

        rank 0  F0 F1 F2 F3 .  .  .
        rank 1  .  F0 F1 F2 F3 .  .
        rank 2  .  .  F0 F1 F2 F3 .
        rank 3  .  .  .  F0 F1 F2 F3

    Microbatch i runs on stage s in slot ``enters(i) + s``. In a loop of v stages on each rank, p microbatches enter one
    after another and the next p when those have left: each rank is idle for p - 1 slots, (p - 1) / v forwards of all its
    stages, if m is a multiple of p. In a v the way back crosses the way there, one microbatch enters in every second
    slot, and each rank is idle for 2 (p - 1) slots. Nothing is kept for a backward.
    """

    def enters(microbatch: int) -> int:
        if placement == "v":
            return num_chunks * microbatch
        finished, place = divmod(microbatch, num_ranks)
        return finished * num_ranks * num_chunks + place

    slots: list[list[tuple[int, int, int]]] = [[] for _ in range(num_ranks)]
    for stage in range(num_ranks * num_chunks):
        row = slots[pp_of_stage(stage, num_ranks, placement)]
        row += [(enters(microbatch) + stage, stage, microbatch) for microbatch in range(num_microbatches)]
    return tuple(tuple(Action("F", stage, microbatch) for _, stage, microbatch in sorted(row)) for row in slots)
