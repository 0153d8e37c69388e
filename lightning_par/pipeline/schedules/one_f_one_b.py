"""1F1B: a backward as soon as there is one."""

from __future__ import annotations

from lightning_par.pipeline.action import Action, Row, Table


def one_f_one_b(num_ranks: int, num_chunks: int, num_microbatches: int) -> Table:
    """One forward, one backward in turn (PipeDream-flush, arXiv 2104.04473, section 2.2 and figure 4, top).

    For p = 4 ranks and m = 4 microbatches, with F and B of one slot each::

        rank 0  F0 F1 F2 F3 .  .  .  B0 .  B1 .  B2 .  B3
        rank 1  .  F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3 .
        rank 2  .  .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .  .
        rank 3  .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .  .

    Each rank is idle for the time of p - 1 forwards and backwards, as in GPipe. Rank r holds the activations of
    min(m, p - r) microbatches, however many there are.
    """
    assert num_chunks == 1, "1F1B has one stage on each rank"
    return tuple(_row(rank, num_ranks - 1 - rank, num_microbatches) for rank in range(num_ranks))


def _row(stage: int, num_later_stages: int, num_microbatches: int) -> Row:
    """Run ahead by as many forwards as there are later stages, then alternate, then the backwards that are left."""
    num_warmup = min(num_later_stages, num_microbatches)
    row = [Action("F", stage, i) for i in range(num_warmup)]
    for i in range(num_microbatches - num_warmup):
        row += [Action("F", stage, i + num_warmup), Action("B", stage, i)]
    row += [Action("B", stage, i) for i in range(num_microbatches - num_warmup, num_microbatches)]
    return tuple(row)
