"""The order in which the stages of a rank take turns when stages go round the ranks in a loop."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_par.pipeline.action import Table


def rounds(sizes: Iterable[int], num_chunks: int) -> list[tuple[int, int]]:
    """Chunk and microbatch of every forward of a rank, in order (Megatron-LM, arXiv 2104.04473, section 2.2).

    In a round each chunk in turn takes the same microbatches, as many as there are ranks or more: when the last of them
    has left the first rank, the first is back from the last rank. For rounds of ``sizes`` (2, 2) and 2 chunks a, b:
    0a 1a 0b 1b 2a 3a 2b 3b. Backwards run in the same order with the last chunk first.
    """
    order: list[tuple[int, int]] = []
    first = 0
    for size in sizes:
        order += [(chunk, microbatch) for chunk in range(num_chunks) for microbatch in range(first, first + size)]
        first += size
    return order


def leave_out(table: Table, num_microbatches: int) -> Table:
    """The table without the microbatches from ``num_microbatches`` on.

    What is left can run as before, no later and with no more in flight, because no microbatch waits for another one.
    """
    return tuple(tuple(action for action in row if action.microbatch < num_microbatches) for row in table)
