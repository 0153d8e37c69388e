"""Interleaved zero-bubble: several stages on each rank in a loop, with split backwards."""

from __future__ import annotations

from typing import TypeAlias

from lightning_par.pipeline.action import Action, Table
from lightning_par.pipeline.schedules.rounds import rounds

_Ends: TypeAlias = list[list[int]]
_NEVER = 2**62  # a slot that does not come


def interleaved_zb(num_ranks: int, num_chunks: int, num_microbatches: int) -> Table:
    """Interleaved stages with the weight gradients put where a rank would wait, in the memory of p microbatches.

    The turns of the stages are those of interleaved 1F1B (arXiv 2104.04473, section 2.2), the halves of a backward those
    of ZB-H1 (arXiv 2401.10241, section 2). In time of slots of one action of one stage, each rank runs in each slot the
    first of these that it can: the next I, the next F if fewer than p v activations are held, the next W.

    For p = 2 ranks, v = 2 chunks (stages 0 and 2 are a and b of rank 0) and m = 4 microbatches::

        rank 0  F0a F1a F0b F1b .   I0b W0b I1b I0a I1a F2a W1b F3a W0a F2b W1a F3b I2b W2b I3b I2a I3a W3b W2a W3a
        rank 1  .   F0a F1a F0b I0b F1b I1b I0a I1a W0b W1b F2a W0a F3a W1a F2b I2b F3b I3b I2a I3a W2b W3b W2a W3a

    With F = I = W and a multiple of p microbatches, each rank is idle for p - 1 slots, which is (p - 1) / v forwards of
    all its stages. It holds at most the activations of p microbatches, counted to the end of W. Of another number the last
    round is short, and ranks may wait a little in it.
    """
    forward_ends, input_ends = ([[_NEVER] * num_microbatches for _ in range(num_ranks * num_chunks)] for _ in range(2))
    ranks = [_Rank(rank, num_ranks, num_chunks, num_microbatches, forward_ends, input_ends) for rank in range(num_ranks)]
    slot = 0
    while not all(rank.has_ended for rank in ranks):
        for rank in ranks:
            rank.step(slot)
        slot += 1
    return tuple(tuple(rank.row) for rank in ranks)


class _Rank:
    """One rank on the way to its row: what it has run, and what it may run next.

    Args:
        rank, num_ranks, num_chunks, num_microbatches: where it is.
        forward_ends, input_ends: by stage and microbatch the slot from which on others can take the result, of all ranks.
    """

    def __init__(
        self, rank: int, num_ranks: int, num_chunks: int, num_microbatches: int, forward_ends: _Ends, input_ends: _Ends
    ) -> None:
        num_whole, rest = divmod(num_microbatches, num_ranks)
        order = rounds([*[num_ranks] * num_whole, rest], num_chunks)
        self._num_stages = self._most_held = num_ranks * num_chunks
        self._forwards = [(chunk * num_ranks + rank, i) for chunk, i in order]
        self._backwards = [((num_chunks - 1 - chunk) * num_ranks + rank, i) for chunk, i in order]
        self._forward_ends, self._input_ends = forward_ends, input_ends
        self._num_forwards = self._num_inputs = self._num_weights = 0
        self.row: list[Action] = []

    @property
    def has_ended(self) -> bool:
        return self._num_weights == len(self._forwards)

    def step(self, slot: int) -> None:
        """Run the first action that can run in this slot, if any."""
        if self._num_inputs < len(self._backwards):
            stage, i = self._backwards[self._num_inputs]
            is_last = stage == self._num_stages - 1
            if (self._forward_ends[stage][i] if is_last else self._input_ends[stage + 1][i]) <= slot:
                self._num_inputs += 1
                self._input_ends[stage][i] = slot + 1
                self.row.append(Action("I", stage, i))
                return
        if self._num_forwards < len(self._forwards) and self._num_forwards - self._num_weights < self._most_held:
            stage, i = self._forwards[self._num_forwards]
            if stage == 0 or self._forward_ends[stage - 1][i] <= slot:
                self._num_forwards += 1
                self._forward_ends[stage][i] = slot + 1
                self.row.append(Action("F", stage, i))
                return
        if self._num_weights < self._num_inputs:
            self.row.append(Action("W", *self._backwards[self._num_weights]))
            self._num_weights += 1
