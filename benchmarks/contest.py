"""Systems that do the same work: each is checked against one process, then they are timed in turns, in the same processes."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.stepping import MakeOptimizer, Step
from benchmarks.turns import keep_freed_memory, progress_bar, time_step, turns

OURS = "lightning_par"
_CHECKED_STEPS, _TOLERANCE = 3, 1e-5
# plain gradient descent tells a gradient that is too long or too short, and Adam does not
_CHECK = partial(torch.optim.SGD, lr=0.5)
_TIMED = partial(torch.optim.AdamW, lr=1e-4)


@dataclass(frozen=True)
class Taken:
    """One step.

    Attributes:
        loss: the mean over all ranks.
        seconds: of the slowest rank.
        cpu_seconds: that the busiest rank's process computed in it.
    """

    loss: float
    seconds: float
    cpu_seconds: float


Run = Callable[[int], list[Taken]]  # makes so many steps; collective over all ranks, equal on all


@dataclass(frozen=True)
class System:
    """Who does a work, and how.

    Attributes:
        name: who.
        work: what; systems of the same work are compared.
        install: sets up a new model with an optimizer. Collective over all ranks.
        num_warm: steps at the beginning of a run that are not timed: what other systems have left in caches is no part of it.
    """

    name: str
    work: str
    install: Callable[[int, MakeOptimizer], Run]
    num_warm: int = 1


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        num_rounds: turns of each system are twice that.
        num_steps: in each turn.
    """

    num_rounds: int = 5
    num_steps: int = 6


EFFORTS = {"quick": Effort(1, 3), "brief": Effort(3, 5), "full": Effort()}


@dataclass(frozen=True)
class Row:
    """A system's times.

    Attributes:
        system: its name.
        work: what it does.
        seconds: of each step, of the slowest rank.
        cpu_seconds: that the busiest rank's process computed in it.
        wrong: what differs from one process; nothing is timed then.
    """

    system: str
    work: str
    seconds: tuple[float, ...] = ()
    cpu_seconds: tuple[float, ...] = ()
    wrong: str = ""

    def in_contest(self) -> Row:
        """This row, as those of other benchmarks give one."""
        return self


@dataclass
class _Times:
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


def differences(rows: Iterable[Row]) -> list[str]:
    """What systems do not compute as one process."""
    return [f"{row.system}, {row.work}: {row.wrong}" for row in rows if row.wrong]


def in_steps(step: Step) -> Run:
    """A run of a step that stays installed."""

    def run(num_steps: int) -> list[Taken]:
        taken = []
        for _ in range(num_steps):
            losses: list[torch.Tensor] = []
            seconds, cpu_seconds = time_step(lambda kept=losses: kept.append(step()))  # type: ignore[misc]
            taken.append(Taken(mean_loss(losses[0]), seconds, cpu_seconds))
        return taken

    return run


def mean_loss(loss: torch.Tensor) -> float:
    """Over all ranks. Collective over all ranks."""
    total = loss.clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def measure_rank(
    rank: int,
    world_size: int,
    systems: Sequence[System],
    train_alone: Callable[[MakeOptimizer, int], list[float]],
    effort: Effort,
) -> list[Row]:
    """Check every system against one process, then time them all. Collective over all ranks; equal on all.

    Args:
        rank: of this process.
        world_size: number of ranks.
        systems: in the order in which they take turns.
        train_alone: the losses of so many steps of one process.
        effort: how much to measure.
    """
    warnings.simplefilter("ignore")  # deprecations inside the other systems
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    keep_freed_memory()
    truth = train_alone(_CHECK, _CHECKED_STEPS)
    runs: dict[System, Run] = {}
    wrong: dict[System, str] = {}
    times = {system: _Times() for system in systems}
    with progress_bar(rank) as progress:
        task = progress.add_task("", total=len(systems) * (1 + 2 * effort.num_rounds))

        def show(words: str, system: System) -> None:
            progress.update(task, description=f"{words} {system.name} {system.work}", refresh=True)

        for system in systems:
            show("checking", system)
            wrong[system] = _difference(system.install(rank, _CHECK), truth)
            runs[system] = system.install(rank, _TIMED)
            progress.advance(task)
        for system in turns([system for system in systems if not wrong[system]], effort.num_rounds):
            show("timing", system)
            _take_turn(runs[system], system.num_warm, effort.num_steps, times[system])
            progress.advance(task)
        progress.update(task, description="done", refresh=True)
    return [
        Row(system.name, system.work, tuple(times[system].seconds), tuple(times[system].cpu_seconds), wrong[system])
        for system in systems
    ]


def _difference(run: Run, truth: list[float]) -> str:
    """What differs from one process in the first steps; nothing where none does."""
    losses = [taken.loss for taken in run(len(truth))]
    if all(abs(loss - true) <= _TOLERANCE * abs(true) for loss, true in zip(losses, truth, strict=True)):
        return ""
    return f"the losses are {losses}, and {truth} in one process"


def _take_turn(run: Run, num_warm: int, num_steps: int, times: _Times) -> None:
    gc.collect()
    for taken in run(num_warm + num_steps)[num_warm:]:
        times.seconds.append(taken.seconds)
        times.cpu_seconds.append(taken.cpu_seconds)
