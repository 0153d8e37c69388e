"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from lightning_par.pipeline.action import Action, Table


def gpipe(num_stages: int, num_microbatches: int) -> Table:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965, section 2.3 and figure 2c).

    For p = 4 stages and m = 4 microbatches, with F and B of one slot each::

        stage 0  F0 F1 F2 F3 .  .  .  .  .  .  B0 B1 B2 B3
        stage 1  .  F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3 .
        stage 2  .  .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .  .
        stage 3  .  .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .  .

    Bubble: (p - 1) / (m + p - 1). Peak memory: the activations of all m microbatches, on every stage.
    The paper's figure runs backwards last to first; here they run first to last, so that gradients are summed in the
    same order, and so to the same bits, under every schedule.
    """
    microbatches = range(num_microbatches)
    row = (*(Action("F", i) for i in microbatches), *(Action("B", i) for i in microbatches))
    return (row,) * num_stages
