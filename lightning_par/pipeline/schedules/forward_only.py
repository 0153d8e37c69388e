"""Forward only: what evaluation runs."""

from __future__ import annotations

from lightning_par.pipeline.action import Action, Table


def forward_only(num_stages: int, num_microbatches: int) -> Table:
    """Every forward in turn, for evaluation and prediction.

    For p = 4 stages and m = 4 microbatches::

        stage 0  F0 F1 F2 F3 .  .  .
        stage 1  .  F0 F1 F2 F3 .  .
        stage 2  .  .  F0 F1 F2 F3 .
        stage 3  .  .  .  F0 F1 F2 F3

    Bubble: (p - 1) / (m + p - 1). Nothing is kept for a backward.
    """
    return (tuple(Action("F", i) for i in range(num_microbatches)),) * num_stages
