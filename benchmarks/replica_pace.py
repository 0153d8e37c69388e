"""How long a step of replicas takes with each system, in one run, in turns as in `benchmarks.pace`."""

from __future__ import annotations

import ctypes
import gc
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.pace import progress_bar, time_step, turns
from benchmarks.replicas import SYSTEMS, Step, System, mean_loss, train_alone

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)
_CHECKED_STEPS, _TOLERANCE = 3, 1e-5
# plain gradient descent tells a gradient that is too long or too short, and Adam does not
_CHECK = partial(torch.optim.SGD, lr=0.5)
_TIMED = partial(torch.optim.AdamW, lr=1e-4)


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        num_rounds: turns of each system are twice that.
        num_steps: in each turn.
    """

    num_rounds: int = 5
    num_steps: int = 6


QUICK = Effort(1, 3)


@dataclass(frozen=True)
class Row:
    """A system's times.

    Attributes:
        system: its name.
        zero: what is sharded.
        seconds: of each step, of the slowest rank.
        cpu_seconds: that the busiest rank's process computed in it.
        wrong: what differs from one process; nothing is timed then.
    """

    system: str
    zero: int
    seconds: tuple[float, ...] = ()
    cpu_seconds: tuple[float, ...] = ()
    wrong: str = ""


@dataclass
class _Times:
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


def differences(rows: Iterable[Row]) -> list[str]:
    """What systems do not compute as one process."""
    return [f"{row.system}, zero{row.zero}: {row.wrong}" for row in rows if row.wrong]


def measure_rank(rank: int, world_size: int, effort: Effort) -> list[Row]:
    """Check every system against one process, then time them all. Collective over all ranks; equal on all.

    Args:
        rank: of this process.
        world_size: number of ranks.
        effort: how much to measure.
    """
    warnings.simplefilter("ignore")  # deprecations inside the other systems
    _keep_freed_memory()
    truth = train_alone(_CHECK, _CHECKED_STEPS)
    steps: dict[System, Step] = {}
    wrong: dict[System, str] = {}
    times = {system: _Times() for system in SYSTEMS}
    with progress_bar(rank) as progress:
        task = progress.add_task("", total=len(SYSTEMS) * (1 + 2 * effort.num_rounds))

        def show(words: str) -> None:
            progress.update(task, description=words, refresh=True)

        for system in SYSTEMS:
            show(f"checking {system.name} zero{system.zero}")
            wrong[system] = _difference(system, rank, truth)
            steps[system] = system.install(rank, _TIMED)
            progress.advance(task)
        for system in turns([system for system in SYSTEMS if not wrong[system]], effort.num_rounds):
            show(f"timing {system.name} zero{system.zero}")
            _take_turn(steps[system], effort, times[system])
            progress.advance(task)
        show("done")
    return [
        Row(system.name, system.zero, tuple(times[system].seconds), tuple(times[system].cpu_seconds), wrong[system])
        for system in SYSTEMS
    ]


def _keep_freed_memory() -> None:
    """Have the C library keep what is freed, as the allocators of devices do.

    By itself it gives the end of the heap back to the kernel again and again, and how much depends on where earlier allocations
    happen to lie: of the same step 1,000 pages are new, or 8,000, which takes up to 20 ms.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def _difference(system: System, rank: int, truth: list[float]) -> str:
    """What differs from one process in the first steps; nothing where none does."""
    step = system.install(rank, _CHECK)
    losses = [mean_loss(step()) for _ in truth]
    if all(abs(loss - true) <= _TOLERANCE * abs(true) for loss, true in zip(losses, truth, strict=True)):
        return ""
    return f"the losses are {losses}, and {truth} in one process"


def _take_turn(step: Step, effort: Effort, times: _Times) -> None:
    gc.collect()
    time_step(step)  # what other systems have left in caches is no part of it
    for _ in range(effort.num_steps):
        seconds, cpu_seconds = time_step(step)
        times.seconds.append(seconds)
        times.cpu_seconds.append(cpu_seconds)
