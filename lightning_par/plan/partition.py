"""Cutting the chain into stages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def partition_blocks(costs: Sequence[float], num_stages: int, first: float = 0, last: float = 0) -> list[int]:
    """Blocks on each stage, so that the dearest stage is as cheap as possible; every stage has at least one.

    Exact, by dynamic programming over the position of the last cut, O(num_stages x n^2); among equally good cuts the
    one that gives earlier stages more, because the last stage also holds the loss.

    Args:
        costs: cost of each block.
        num_stages: stages, at most ``len(costs)``.
        first, last: cost of what comes before the blocks, on the first stage, and after them, on the last.
    """
    prefix = [0.0, *accumulate(costs)]
    n = len(costs)
    best: list[list[tuple[float, int]]] = [[(float("inf"), 0)] * (n + 1) for _ in range(num_stages + 1)]
    best[0][0] = (0.0, 0)
    for stage in range(1, num_stages + 1):
        extra = (first if stage == 1 else 0) + (last if stage == num_stages else 0)
        for end in range(stage, n + 1):
            options = (
                (max(best[stage - 1][start][0], prefix[end] - prefix[start] + extra), -start)
                for start in range(stage - 1, end)
                if best[stage - 1][start][0] < float("inf")
            )
            cost, negative = min(options)
            best[stage][end] = (cost, -negative)
    cuts = [n]
    for stage in range(num_stages, 0, -1):
        cuts.append(best[stage][cuts[-1]][1])
    cuts.reverse()
    return [b - a for a, b in pairwise(cuts)]
