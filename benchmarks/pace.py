"""How long a step of each system takes, with work and without, in one run.

Systems take turns, as in `benchmarks.turns`. In its turn a system makes steps that work and steps that do not; ranks begin each
together, and it has taken what the slowest rank took.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from benchmarks import contest
from benchmarks.napping import NUM_MICROBATCHES, NUM_RANKS, Naps, compute_truth, wake_in_time
from benchmarks.pipelines import LEARNING_RATE, SYSTEMS, Pipeline, System, nap_in_notes
from benchmarks.turns import progress_bar, time_step, turns
from lightning_par.pipeline.action import Table
from lightning_par.pipeline.simulate import Costs, simulate

WORK_SECONDS = 0.04  # of a rank for each of F, I and W of a microbatch
IDEAL_SECONDS = 3 * WORK_SECONDS * NUM_MICROBATCHES  # of a rank that never waits
NUM_LEARNING_STEPS = 6  # with work, for systems that make their table from them


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        num_rounds: turns of each system are twice that.
        num_working_steps, num_idle_steps: in each turn.
    """

    num_rounds: int = 3
    num_working_steps: int = 3
    num_idle_steps: int = 10


EFFORTS = {"quick": Effort(1, 1, 5), "brief": Effort(2, 2, 8), "full": Effort()}


@dataclass
class Times:
    """What has been measured of a system; see `Row`."""

    seconds: list[float] = field(default_factory=list)
    made_up_seconds: list[float] = field(default_factory=list)
    idle_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A system's times.

    Attributes:
        system: its name.
        schedule: title of its schedule.
        seconds: of each step with work.
        made_up_seconds: by which naps were shorter in each of these, because blocks computed longer than without work.
        idle_seconds: of each step without.
        cpu_seconds: that a rank's process computed in each of those.
        theory: the overhead over the ideal that the table has when nothing else takes time.
        wrong: what differs from one process; nothing is timed then.
    """

    system: str
    schedule: str
    seconds: tuple[float, ...]
    made_up_seconds: tuple[float, ...]
    idle_seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    theory: float
    wrong: str = ""

    @property
    def overhead(self) -> float:
        """Over the ideal, after the step without work is subtracted; of the quickest steps."""
        return (min(self.seconds) - min(self.idle_seconds)) / IDEAL_SECONDS - 1

    @property
    def made_up(self) -> float:
        """What naps made up for in the quickest step, as a part of the ideal: by so much would the overhead be higher."""
        return self.made_up_seconds[self.seconds.index(min(self.seconds))] / IDEAL_SECONDS

    def in_contest(self) -> contest.Row:
        """Its steps with work, and the processor time of those without."""
        return contest.Row(self.system, f"pp{NUM_RANKS} {self.schedule}", self.seconds, self.cpu_seconds, self.wrong)


def differences(rows: Iterable[Row]) -> list[str]:
    """What systems do not compute as one process."""
    return [f"{row.system}, {row.schedule}: {row.wrong}" for row in rows if row.wrong]


def measure_rank(rank: int, world_size: int, effort: Effort) -> list[Row]:
    """Check every system against one process, then time them all. Collective over all ranks; equal on all.

    Args:
        rank: of this process.
        world_size: number of ranks.
        effort: how much to measure.
    """
    warnings.simplefilter("ignore")  # deprecations inside the other systems
    wake_in_time()
    naps = Naps()
    nap_in_notes(naps)
    times = {system: Times() for system in SYSTEMS}
    num_turns = len(SYSTEMS) * (1 + 2 * effort.num_rounds)
    with progress_bar(rank) as progress:
        task = progress.add_task("", total=num_turns)

        def show(words: str) -> None:
            progress.update(task, description=words, refresh=True)

        pipelines, wrong = {}, {}
        for system in SYSTEMS:
            show(f"checking {system.name} {system.title}")
            pipelines[system] = system.install(rank, naps)
            wrong[system] = _check(pipelines[system], system, naps)
            progress.advance(task)
        right = [system for system in SYSTEMS if not wrong[system]]
        for system in turns(right, effort.num_rounds):
            show(f"timing {system.name} {system.title}")
            _take_turn(pipelines[system], naps, effort, times[system])
            progress.advance(task)
        show("done")
    rows = []
    for system in SYSTEMS:
        taken, theory = times[system], _theory(pipelines[system].table())
        working = tuple(taken.seconds), tuple(taken.made_up_seconds)
        idle = tuple(taken.idle_seconds), tuple(taken.cpu_seconds)
        rows.append(Row(system.name, system.title, *working, *idle, theory, wrong[system]))
    return rows


def _check(pipeline: Pipeline, system: System, naps: Naps) -> str:
    """One step against one process, and the steps that a system learns from. What differs, on any rank; else nothing."""
    before = {name: parameter.detach().clone() for name, parameter in pipeline.parameters.items()}
    loss = pipeline.step()
    gradients = {name: (before[name] - parameter.detach()) / LEARNING_RATE for name, parameter in pipeline.parameters.items()}
    words = ""
    try:
        compute_truth().check(loss, gradients)
    except ValueError as error:
        words = str(error)
    found: list[str] = [""] * NUM_RANKS
    dist.all_gather_object(found, words)
    for group in pipeline.optimizer.param_groups:
        group["lr"] = 0.0
    naps.work(WORK_SECONDS if system.learns else 0.0)
    for _ in range(NUM_LEARNING_STEPS):
        pipeline.step()
    naps.work(0.0)  # or the next system's dry run would see what they compute
    return next(filter(None, found), "")


def _take_turn(pipeline: Pipeline, naps: Naps, effort: Effort, times: Times) -> None:
    gc.collect()
    naps.work(0.0)
    time_step(pipeline.step)  # what other systems have left in caches is no part of it
    for _ in range(effort.num_idle_steps):
        seconds, cpu_seconds = time_step(pipeline.step)
        times.idle_seconds.append(seconds)
        times.cpu_seconds.append(cpu_seconds)
    naps.work(WORK_SECONDS)
    for _ in range(effort.num_working_steps):
        naps.made_up = 0.0
        times.seconds.append(time_step(pipeline.step)[0])
        times.made_up_seconds.append(_most(naps.made_up))


def _most(seconds: float) -> float:
    """Of any rank."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def _theory(table: Table) -> float:
    """Overhead over the ideal by the simulator, for equal stages whose messages take no time."""
    num_stages = 1 + max(action.stage for row in table for action in row)
    seconds = WORK_SECONDS * NUM_RANKS / num_stages
    makespan = simulate(table, Costs.equal(num_stages, seconds, seconds, seconds)).makespan_seconds
    return makespan / IDEAL_SECONDS - 1
