"""ZB-V: two stages on each rank, there and back, with split backwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

from lightning_par.pipeline.action import Action, Kind, Row, Table
from lightning_par.pipeline.schedules.rounds import leave_out

_Word: TypeAlias = tuple[Kind, int]


def zb_v(num_ranks: int, num_chunks: int, num_microbatches: int) -> Table:
    """A zero-bubble schedule with no more memory than 1F1B (arXiv 2401.10241, section 6; V-ZB in arXiv 2405.15362).

    Rank r has stages r (a) and 2p - 1 - r (b), so that the first rank computes the loss too. For p = 2 ranks and m = 4
    microbatches, with F, I and W of one slot each::

        rank 0  F0a F1a F2a F0b I0b W0b F1b I1b W1b F3a I0a W0a F2b I2b W2b I1a W1a F3b I3b W3b I2a W2a I3a W3a .
        rank 1  .   F0a F0b F1a F1b I0b W0b F2a I0a W0a F2b I1b W1b F3a I1a W1a F3b I2b W2b I2a I3b I3a W2a W3b W3a

    With F = I = W and m at least 2p - 1, each rank is idle for p - 1 slots, which is (p - 1) / 2 forwards of its two
    stages. It holds at most the activations of p microbatches, counted to the end of W.

    Fewer microbatches run the table of 2p - 1 without those that do not exist.
    """
    assert num_chunks == 2, "ZB-V has two stages on each rank"
    num_planned = max(num_microbatches, 2 * num_ranks - 1)
    return leave_out(tuple(_row(rank, num_ranks, num_planned) for rank in range(num_ranks)), num_microbatches)


def _row(rank: int, num_ranks: int, num_microbatches: int) -> Row:
    """Forwards until the first microbatch is back, turns of one microbatch on both stages, then what is left.

    How often each runs is that of ``ScheduleZBVZeroBubble`` in torch 2.13, which gives the same table.
    """
    a, b = rank, 2 * num_ranks - 1 - rank
    num_later = num_ranks - rank  # ranks from here to the turn of the v
    num_turns = num_microbatches - num_ranks
    num_forwards = num_turns - (num_later - 1)  # of stage a, not run before the turns begin
    (fa, ia, wa), (fb, ib, wb) = _words(a), _words(b)
    words = [
        *[fa] * (2 * num_later - 1),
        *[fb, fa] * rank,
        *[fb, ib, wb] * num_later,
        *[fa, ia, wa, fb, ib, wb] * num_forwards,
        *[ia, wa, fb, ib, wb] * (num_turns - num_forwards),
        *[ia, ib] * rank,
        *[ia, wa] * num_later,
        *[wb] * rank,
        *[wa] * rank,
    ]
    return _numbered(words)


def _words(stage: int) -> tuple[_Word, _Word, _Word]:
    return ("F", stage), ("I", stage), ("W", stage)


def _numbered(words: Sequence[_Word]) -> Row:
    """Give each kind of action of each stage the next microbatch."""
    count: Counter[_Word] = Counter()
    row = []
    for kind, stage in words:
        row.append(Action(kind, stage, count[kind, stage]))
        count[kind, stage] += 1
    return tuple(row)
