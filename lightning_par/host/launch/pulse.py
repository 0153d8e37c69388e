"""Heartbeats of the ranks of one machine, in memory that they share.

Each rank has two numbers: a count, which a thread of it moves on, and how many seconds it may leave the count as it is
(0: for ever). Writing them is no system call, so that the second one can follow every step. Who listens counts its own turns
and not seconds, so that a run that was stopped whole (Ctrl-Z) goes on where it was.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile

_MAX = 2**32 - 1


def share_memory(num_ranks: int) -> int:
    """The descriptor of memory for so many ranks, zero; for this process and those that inherit it."""
    with tempfile.TemporaryFile() as file:
        file.truncate(8 * num_ranks)
        return os.dup(file.fileno())


class Pulse:
    """This rank's heartbeat, and those of the others.

    Args:
        descriptor: of what `share_memory` gave; closed here.
        rank: which of the ranks this one is, counted from 0.
    """

    def __init__(self, descriptor: int, rank: int) -> None:
        self._numbers = memoryview(mmap.mmap(descriptor, 0)).cast("I")
        os.close(descriptor)
        self._own = 2 * rank
        self._heard: dict[int, tuple[int, float]] = {}  # of each rank: its count, and for how many seconds it has been that

    def beat(self) -> None:
        """This rank answers."""
        self._numbers[self._own] = (self._numbers[self._own] + 1) % _MAX

    def expect(self, seconds: float) -> None:
        """This rank must beat at least every so many seconds from now on; 0 for never."""
        self._numbers[self._own + 1] = min(math.ceil(seconds), _MAX)

    def silent_seconds(self, rank: int, turn_seconds: float) -> float:
        """For how long ``rank`` has been silent where it must beat; 0 while it is in time.

        Args:
            rank: which one.
            turn_seconds: how often this is called for it.
        """
        count, allowed = self._numbers[2 * rank], self._numbers[2 * rank + 1]
        known, seconds = self._heard.get(rank, (count, 0.0))
        seconds = seconds + turn_seconds if count == known and allowed else 0.0
        self._heard[rank] = count, seconds
        return seconds if seconds > allowed else 0.0
