"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from lightning_par.pipeline.action import Action, Table


def gpipe(num_ranks: int, num_chunks: int, num_microbatches: int) -> Table:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965, section 2.3 and figure 2c).

    For p = 4 ranks and m = 4 microbatches, with F and B of one slot each::

        rank 0  F0 F1 F2 F3 .  .  .  .  .  .  B0 B1 B2 B3
        rank 1  .  F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3 .
        rank 2  .  .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .  .
        rank 3  .  .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .  .

    Each rank is idle for the time of p - 1 forwards and backwards, and holds the activations of all m microbatches.
    The paper's figure runs backwards last to first; here they run first to last, so that gradients are summed in the
    same order, and so to the same bits, under every schedule.
    """
    assert num_chunks == 1, "GPipe has one stage on each rank"
    microbatches = range(num_microbatches)
    return tuple(
        (*(Action("F", rank, i) for i in microbatches), *(Action("B", rank, i) for i in microbatches)) for rank in range(num_ranks)
    )
