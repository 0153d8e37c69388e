"""ZB-H1: 1F1B with the weight gradients put where a rank would wait."""

from __future__ import annotations

from lightning_par.pipeline.action import Action, Row, Table


def zb_h1(num_ranks: int, num_chunks: int, num_microbatches: int) -> Table:
    """1F1B that passes the input gradient on before it computes the weights' (arXiv 2401.10241, section 2.1, figure 2).

    For p = 4 ranks and m = 6 microbatches, with F, I and W of one slot each::

        rank 0  F0 F1 F2 F3 .  .  .  I0 W0 F4 I1 W1 F5 I2 W2 I3 W3 I4 W4 I5 W5
        rank 1  .  F0 F1 F2 .  .  I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 I4 W3 I5 W4 W5
        rank 2  .  .  F0 F1 .  I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 I5 W3 W4 W5
        rank 3  .  .  .  F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 W3 W4 W5

    Rank r computes the weight gradients r microbatches late: that much of its work is left for the end, where in 1F1B
    it waits for the ranks behind it. With W no longer than F or I, each rank is idle for (p - 1)(F + I - W): a third of
    1F1B's time if the three are equal. It holds at most the activations of p microbatches, counted to the end of W.
    """
    assert num_chunks == 1, "ZB-H1 has one stage on each rank"
    return tuple(_row(rank, num_ranks - 1 - rank, num_microbatches) for rank in range(num_ranks))


def _row(stage: int, num_later_stages: int, num_microbatches: int) -> Row:
    num_warmup = min(num_later_stages, num_microbatches)
    row = [Action("F", stage, i) for i in range(num_warmup)]
    for i in range(num_microbatches):
        if i + num_warmup < num_microbatches:
            row.append(Action("F", stage, i + num_warmup))
        row.append(Action("I", stage, i))
        if i >= stage:
            row.append(Action("W", stage, i - stage))
    row += [Action("W", stage, i) for i in range(max(0, num_microbatches - stage), num_microbatches)]
    return tuple(row)
