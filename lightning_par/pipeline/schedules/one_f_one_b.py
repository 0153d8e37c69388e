"""1F1B: a backward as soon as there is one."""

from __future__ import annotations

from lightning_par.pipeline.action import Action, Row, Table


def one_f_one_b(num_stages: int, num_microbatches: int) -> Table:
    """One forward, one backward in turn (PipeDream-flush, arXiv 2104.04473, section 2.2 and figure 4, top).

    For p = 4 stages and m = 4 microbatches, with F and B of one slot each::

        stage 0  F0 F1 F2 F3 .  .  .  B0 .  B1 .  B2 .  B3
        stage 1  .  F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3 .
        stage 2  .  .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .  .
        stage 3  .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .  .

    Bubble: (p - 1) / (m + p - 1), as GPipe. Peak memory: stage r holds the activations of min(m, p - r) microbatches,
    however many there are.
    """
    return tuple(_row(num_stages - 1 - stage, num_microbatches) for stage in range(num_stages))


def _row(num_later_stages: int, num_microbatches: int) -> Row:
    """Run ahead by as many forwards as there are later stages, then alternate, then the backwards that are left."""
    num_warmup = min(num_later_stages, num_microbatches)
    row = [Action("F", i) for i in range(num_warmup)]
    for i in range(num_microbatches - num_warmup):
        row += [Action("F", i + num_warmup), Action("B", i)]
    row += [Action("B", i) for i in range(num_microbatches - num_warmup, num_microbatches)]
    return tuple(row)
