"""Systems are timed in turns, there and back again (ABBA), so that a machine that gets slower or faster does so for all alike."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_Each = TypeVar("_Each")
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)


def turns(systems: Sequence[_Each], num_rounds: int) -> Iterator[_Each]:
    """Each system ``2 * num_rounds`` times, there and back again."""
    for _ in range(num_rounds):
        yield from systems
        yield from reversed(systems)


def time_step(step: Callable[[], Any]) -> tuple[float, float]:
    """Time and processor time of the slowest rank. Collective over all ranks."""
    lap = Lap()
    step()
    return lap.end()


class Lap:
    """A stretch that all ranks begin together. Making one and ending it are collective over all ranks."""

    def __init__(self) -> None:
        dist.barrier()
        self._begin, self._cpu_begin = time.perf_counter(), time.process_time()

    def end(self) -> tuple[float, float]:
        """Time and processor time since then, of the slowest rank and of the busiest."""
        seconds = torch.tensor([time.perf_counter() - self._begin, time.process_time() - self._cpu_begin], dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        return float(seconds[0]), float(seconds[1])


def progress_bar(rank: int) -> Progress:
    """Drawn by the first rank between the turns, never by a thread beside what is timed."""
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), auto_refresh=False, disable=rank != 0)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, as the allocators of devices do.

    By itself it gives the end of the heap back to the kernel again and again, and how much depends on where earlier allocations
    happen to lie: of the same step 1,000 pages are new, or 8,000, which takes up to 20 ms.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
