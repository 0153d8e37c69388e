"""Cutting the chain into stages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

_MOST = 2**62  # of a whole number in an array


def partition_blocks(costs: Sequence[float], num_stages: int, first: float = 0, last: float = 0) -> list[int]:
    """Blocks on each stage, so that the dearest stage is as cheap as possible; every stage has at least one.

    Exact, by dynamic programming over the position of the last cut, O(num_stages x n^2); among equally good cuts the
    one that gives earlier stages more, because the last stage also holds the loss.

    Args:
        costs: cost of each block.
        num_stages: stages, at most ``len(costs)``.
        first, last: cost of what comes before the blocks, on the first stage, and after them, on the last.
    """
    sums = [0, *accumulate(costs)]
    prefix = np.array(sums, dtype=object if sums[-1] >= _MOST else None)  # whole numbers stay exact
    n = len(costs)
    length = prefix[None, :] - prefix[:, None]  # of blocks from a row's to a column's
    best, cuts = length[0] + first, []  # the dearest of one stage and of more, by where the last of them ends
    for stage in range(2, num_stages + 1):
        starts = np.arange(n - 1, stage - 2, -1)  # of equally good ones argmin takes that with most before it
        dearest = np.maximum(best[starts, None], length[starts] + (last if stage == num_stages else 0))
        dearest[starts[:, None] >= np.arange(n + 1)] = _MOST if dearest.dtype == int else np.inf  # a stage without blocks is none
        chosen = dearest.argmin(axis=0)
        best = dearest[chosen, np.arange(n + 1)]
        cuts.append(starts[chosen])
    ends = [n]
    for before in reversed(cuts):
        ends.append(int(before[ends[-1]]))
    return [b - a for a, b in pairwise([0, *reversed(ends)])]
