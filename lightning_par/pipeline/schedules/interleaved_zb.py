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
    next I or the next F, whichever has waited longer (in a batch of one round the I), the F if fewer than p v
    activations are held; where none can run, the next W. While p of these are kept back, one also goes before an I or F
    that has only just arrived, which leaves its message a slot to travel: with p = 4, v = 2 and m = 8, 20 messages are
    waited for, and 30 with every I before every F and both before every W. Both take as many slots where messages take
    no time, but for some batches of no multiple of p microbatches, which take a few more.

    For p = 2 ranks, v = 2 chunks (stages 0 and 2 are a and b of rank 0) and m = 4 microbatches::

        rank 0  F0a F1a F0b F1b .   I0b W0b F2a I1b I0a W1b F3a I1a W0a F2b W1a F3b I2b W2b I3b I2a W3b I3a W2a W3a
        rank 1  .   F0a F1a F0b I0b F1b I1b I0a W0b F2a I1a W1b W0a F3a W1a F2b I2b F3b I3b I2a W2b I3a W3b W2a W3a

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
        self._num_ranks, self._has_one_round = num_ranks, num_microbatches <= num_ranks
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
        """Run one action in this slot, if any can run."""
        backward, forward = self._backward_from(), self._forward_from()
        has_waited = min(backward, forward) < slot
        if not has_waited and self._num_inputs - self._num_weights >= self._num_ranks:
            self._run_weight()
        elif backward <= slot and (backward <= forward or self._has_one_round):
            stage, i = self._backwards[self._num_inputs]
            self._num_inputs += 1
            self._input_ends[stage][i] = slot + 1
            self.row.append(Action("I", stage, i))
        elif forward <= slot:
            stage, i = self._forwards[self._num_forwards]
            self._num_forwards += 1
            self._forward_ends[stage][i] = slot + 1
            self.row.append(Action("F", stage, i))
        elif self._num_weights < self._num_inputs:
            self._run_weight()

    def _backward_from(self) -> int:
        """The slot from which the next I can run."""
        if self._num_inputs == len(self._backwards):
            return _NEVER
        stage, i = self._backwards[self._num_inputs]
        return self._forward_ends[stage][i] if stage == self._num_stages - 1 else self._input_ends[stage + 1][i]

    def _forward_from(self) -> int:
        """The slot from which the next F can run; the microbatches of the first stage have always been there."""
        if self._num_forwards == len(self._forwards) or self._num_forwards - self._num_weights >= self._most_held:
            return _NEVER
        stage, i = self._forwards[self._num_forwards]
        return 0 if stage == 0 else self._forward_ends[stage - 1][i]

    def _run_weight(self) -> None:
        self.row.append(Action("W", *self._backwards[self._num_weights]))
        self._num_weights += 1
