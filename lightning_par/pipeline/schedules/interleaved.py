"""Interleaved 1F1B: several stages on each rank, for a shorter bubble."""

from __future__ import annotations

from lightning_par.pipeline.action import Action, Row, Table
from lightning_par.pipeline.schedules.rounds import leave_out, rounds


def interleaved(num_ranks: int, num_chunks: int, num_microbatches: int) -> Table:
    """1F1B in which v stages of each rank take turns (Megatron-LM, arXiv 2104.04473, section 2.2 and figure 4, bottom).

    For p = 2 ranks, v = 2 chunks (stages 0 and 2 are a and b of rank 0) and m = 4 microbatches, F and B of one slot::

        rank 0  F0a F1a F0b F1b F2a B0b F3a B1b F2b B0a F3b B1a .   B2b .   B3b B2a B3a
        rank 1  .   F0a F1a F0b B0b F1b B1b F2a B0a F3a B1a F2b B2b F3b B3b B2a B3a .

    Each rank is idle for (p - 1) / v forwards and backwards of all its stages, with any number of microbatches from p on.
    Rank r holds the activations of p + (p - 1 - 2r) / v microbatches if m is a multiple of p, at most m.

    The paper asks for such a multiple, because a round of fewer than p microbatches makes ranks wait in the middle of the
    batch. Other numbers are dealt evenly to as many whole rounds as there are: 11 on 4 ranks are a round of 6 and one of
    5. With k in the first round, rank r holds k + (2p - 1 - 2r - k) / v. Fewer than p run the table of p without
    those that do not exist.
    """
    num_planned = max(num_microbatches, num_ranks)
    num_rounds = num_planned // num_ranks
    small, num_large = divmod(num_planned, num_rounds)
    sizes = [small + 1] * num_large + [small] * (num_rounds - num_large)
    return leave_out(tuple(_row(rank, num_ranks, num_chunks, sizes) for rank in range(num_ranks)), num_microbatches)


def _row(rank: int, num_ranks: int, num_chunks: int, sizes: list[int]) -> Row:
    """Run ahead until the first microbatch is back from the last stage, then alternate, then what is left."""
    order = rounds(sizes, num_chunks)
    forwards = [Action("F", chunk * num_ranks + rank, i) for chunk, i in order]
    backwards = [Action("B", (num_chunks - 1 - chunk) * num_ranks + rank, i) for chunk, i in order]
    num_warmup = min((num_chunks - 1) * sizes[0] + 2 * (num_ranks - 1 - rank), len(order))
    row = forwards[:num_warmup]
    for forward, backward in zip(forwards[num_warmup:], backwards, strict=False):
        row += [forward, backward]
    return tuple(row + backwards[len(order) - num_warmup :])
