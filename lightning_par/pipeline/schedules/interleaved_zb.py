"""Interleaved zero-bubble: several stages on each rank in a loop, with split backwards."""

from __future__ import annotations

from lightning_par.pipeline.action import Action, Kind, Table, source_of
from lightning_par.pipeline.schedules.rounds import rounds


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
    ranks = [_Rank(rank, num_ranks, num_chunks, num_microbatches) for rank in range(num_ranks)]
    ended: dict[Action, int] = {}  # the slot from which on others can take its result
    slot = 0
    while not all(rank.has_ended for rank in ranks):
        for rank in ranks:
            rank.step(slot, ended)
        slot += 1
    return tuple(tuple(rank.row) for rank in ranks)


class _Rank:
    """One rank on the way to its row: what it has run, and what it may run next."""

    def __init__(self, rank: int, num_ranks: int, num_chunks: int, num_microbatches: int) -> None:
        num_whole, rest = divmod(num_microbatches, num_ranks)
        order = rounds([*[num_ranks] * num_whole, rest], num_chunks)
        self._num_stages, self._most_held = num_ranks * num_chunks, num_ranks * num_chunks
        self._forwards = [Action("F", chunk * num_ranks + rank, i) for chunk, i in order]
        backwards = [((num_chunks - 1 - chunk) * num_ranks + rank, i) for chunk, i in order]
        self._input_gradients = [Action("I", stage, i) for stage, i in backwards]
        self._weight_gradients = [Action("W", stage, i) for stage, i in backwards]
        self._num_done: dict[Kind, int] = {"F": 0, "I": 0, "W": 0}
        self.row: list[Action] = []

    @property
    def has_ended(self) -> bool:
        return len(self.row) == 3 * len(self._forwards)

    def step(self, slot: int, ended: dict[Action, int]) -> None:
        """Run the first action that can run in this slot, if any."""
        f, i, w = self._num_done["F"], self._num_done["I"], self._num_done["W"]
        candidates = self._input_gradients[i : i + 1]
        candidates += self._forwards[f : f + 1] if f - w < self._most_held else []
        candidates += self._weight_gradients[w : w + 1]
        for action in candidates:
            source = source_of(action, self._num_stages)
            if source is None or ended.get(source, slot + 1) <= slot:
                self._num_done[action.kind] += 1
                self.row.append(action)
                ended[action] = slot + 1
                return
