"""Layouts of a few processes, each forecast by the planner and each trained: on devices that sleep and links that are slow.

The planner is asked as `lightning-par plan` asks it, for a cluster whose rate is the one by which the processes sleep and whose
links are those that they have. What is trained is what its strategy would install.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import groupby
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.napping import wake_in_time
from benchmarks.sleeping import NUM_BLOCKS, SleepingDevice, block_flops, make_batch, make_chain
from benchmarks.slow_links import SlowLinks
from lightning_par.engine import Engine
from lightning_par.gradients import sum_shared_gradients
from lightning_par.layout import Layout
from lightning_par.memory import read_optimizer
from lightning_par.plan import Plan
from lightning_par.planner import Anatomy, Cluster, Device, Link
from lightning_par.planner.anatomy import ROWS
from lightning_par.planner.candidate import Candidate, candidates, meshes
from lightning_par.planner.estimate import Estimator
from lightning_par.prepare import prepare_plan
from lightning_par.runtime.mesh import Mesh

BATCH = 16  # samples of a step over all replicas
WORLDS = (2, 4, 8)
IDEAL_SECONDS = {2: 0.4, 4: 0.5, 8: 0.7}  # of a step of ranks that share the products evenly and never wait, by how many they are
INSIDE, BETWEEN = Link(1e6, 3e-4), Link(5e5, 1e-3)
SLOWER = {2: 1, 4: 1, 8: 3}  # devices and links alike: more ranks than cores take turns, which is to be little beside a step
LEAST_CORRELATION, MOST_REGRET, MOST_LOSS_ERROR = 0.9, 0.05, 1e-5
NUM_STEPS, NUM_STEPS_AGAIN, NEAR = 2, 4, 0.1  # those that are so near to the quickest are timed again, more often
_TIMEOUT, _TIMEOUT_SECONDS = timedelta(seconds=60), 900
Case = tuple[Candidate, Plan]
Taken = tuple[float, float | None]  # seconds of a step, and the loss of the first one where this rank has it


@dataclass(frozen=True)
class Row:
    """One layout.

    Attributes:
        world: processes.
        words: what to type.
        forecast: seconds of a step, to the microsecond.
        measured: the quickest of its steps, of the slowest rank.
        memory: bytes of the fullest rank, by which the planner prefers one of equally quick layouts.
        loss_error: of its first loss, as a fraction of that of one process.
    """

    world: int
    words: str
    forecast: float
    measured: float
    memory: int = 0
    loss_error: float = 0.0


def make_cluster(world: int) -> Cluster:
    """Two nodes; of two processes one. A device multiplies as quickly as `IDEAL_SECONDS` says, and `SLOWER`."""
    nodes, slower = 1 if world == 2 else 2, SLOWER[world]
    flops = 3 * NUM_BLOCKS * block_flops(BATCH) / world / IDEAL_SECONDS[world] / slower
    inside, between = (Link(link.bytes_per_second / slower, link.latency_seconds * slower) for link in (INSIDE, BETWEEN))
    rates = {"float32": flops}
    device = Device(2**40, 0.0, float("inf"), rates, rates, 0.0)  # only products take time
    return Cluster(f"{nodes} x {world // nodes} that sleep", nodes, world // nodes, device, inside, between, "chosen")


def ways(cluster: Cluster) -> Iterator[Candidate]:
    """What the planner considers, with twice as many microbatches as ranks of a pipeline; without ZeRO also with as many.

    Besides, ZeRO-2 without a pipeline, where the planner expects what it does of ZeRO-1; and, without ZeRO, tp without sp.
    """
    for mesh in meshes(cluster, NUM_BLOCKS):
        for sp in (True, False) if mesh.tp > 1 else (False,):
            for candidate in candidates(mesh, BATCH // (mesh.dp or 1), sp):
                layout, is_usual = candidate.layout, sp == (mesh.tp > 1)
                if layout.microbatches == 2 * mesh.pp and (is_usual or layout.zero == 0):
                    yield candidate
                    if layout.zero == 1 and mesh.pp == 1:
                        yield replace(candidate, layout=replace(layout, zero=2))
                elif layout.microbatches == mesh.pp and is_usual and layout.zero == 0:
                    yield candidate


def make_estimator(cluster: Cluster) -> Estimator:
    """Of the chain on a cluster."""
    module = make_chain()
    form = read_optimizer(torch.optim.Adam(module.parameters()), dict(module.named_parameters()))
    assert form is not None
    pieces = make_batch(ROWS[0]), make_batch(ROWS[1])
    return Estimator(Anatomy(module, pieces, lambda loss: loss, form), cluster)


def plan_for(candidate: Candidate, known: dict[Any, Plan]) -> Plan:
    """Its plan; of layouts that differ in dp, ZeRO and microbatches alone, made once."""
    layout = candidate.layout
    key = layout.tp, layout.sp, layout.pp, layout.vp, layout.placement
    if key not in known:
        known[key] = prepare_plan(make_chain(), make_batch(BATCH), layout)
    return replace(known[key], layout=layout)


def time_layouts(run_ranks: Any, world: int, say: Callable[[str], None]) -> list[Row]:
    """Forecast and train every layout of so many processes.

    Args:
        run_ranks: of `tests.ranks`.
        world: processes.
        say: told what is being done.

    Raises:
        AssertionError: a rank raised (its traceback is the message).
    """
    cluster, truth = make_cluster(world), _truth()
    estimator, known = make_estimator(cluster), dict[Any, Plan]()
    rows: dict[Candidate, Row] = {}
    for candidate in ways(cluster):
        estimate = estimator.estimate(candidate)
        rows[candidate] = Row(world, candidate.words, round(estimate.step_seconds, 6), float("inf"), estimate.most_bytes)

    def train(candidates: Iterable[Candidate], num_steps: int) -> None:
        for mesh, group in groupby(candidates, mesh_of):
            alike = list(group)
            say(f"{world} processes: {mesh}, {len(alike)} layouts")
            cases = [(candidate, plan_for(candidate, known)) for candidate in alike]
            ranks = run_ranks(measure_rank, world, cases, cluster, num_steps, timeout=_TIMEOUT_SECONDS)
            for candidate, *taken in zip(alike, *ranks, strict=True):
                row, (seconds, _) = rows[candidate], taken[0]
                error = max(abs(loss / truth - 1) for _, loss in taken if loss is not None)
                rows[candidate] = replace(row, measured=min(seconds, row.measured), loss_error=error)

    train(rows, NUM_STEPS)
    most = (1 + NEAR) * min(row.measured for row in rows.values())
    chosen = choose(list(rows.values()))
    train([candidate for candidate, row in rows.items() if row.measured <= most or row is chosen], NUM_STEPS_AGAIN)
    return list(rows.values())


def measure_rank(rank: int, world: int, cases: Sequence[Case], cluster: Cluster, num_steps: int) -> list[Taken]:
    """Train every layout of one mesh. Collective over all ranks.

    Args:
        rank, world: of this process.
        cases: the layouts; all have the same tp, pp, vp and dp.
        cluster: what to behave like.
        num_steps: that are timed, of each.
    """
    warnings.simplefilter("ignore")  # a log without a Trainer
    wake_in_time()
    links = SlowLinks(cluster, rank)
    mesh = Mesh(cases[0][0].layout, _TIMEOUT)
    with links.installed():
        return [_measure(case, mesh, links, cluster, num_steps) for case in cases]


def _measure(case: Case, mesh: Mesh, links: SlowLinks, cluster: Cluster, num_steps: int) -> Taken:
    candidate, plan = case
    layout, rows = candidate.layout, candidate.rows
    mesh.layout, count = layout, layout.microbatches or 1
    module, pieces = make_chain(), [make_batch(rows)] * count
    engine = Engine(module, plan, mesh, torch.device("cpu"), candidate.schedule)
    parameters = list(module.parameters())
    states = engine.own_states([torch.optim.Adam(parameters, lr=1e-3)])
    weights, shapes = [1 / count] * count, [(rows,)] * count

    def step() -> list[Any]:
        losses = engine.train(lambda index: module.training_step(pieces[index], 0), weights, lambda loss: loss, shapes)
        sum_shared_gradients(parameters, mesh)
        states.reduce()
        states.step()
        states.zero_grad()
        return losses

    losses = step()  # at once; it makes what later ones find
    step()
    gc.collect()
    seconds = []
    with SleepingDevice(cluster.device.flops["float32"]):
        for _ in range(num_steps):
            dist.barrier()
            links.is_on, begin = True, time.perf_counter()
            step()
            links.is_on, taken = False, torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            seconds.append(float(taken))
    states.close()
    return min(seconds), mean(loss.item() for loss in losses) if losses else None


def _truth() -> float:
    """The loss of one process."""
    return make_chain().training_step(make_batch(1), 0).item()


# ---------------------------------------------------------------------- what it comes to


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, equal values having the mean of theirs."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    found = np.asarray(values, dtype=float)
    _, places, counts = np.unique(found, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean_ranks: np.ndarray = (ends - (counts - 1) / 2)[places]
    return mean_ranks


def regret(rows: Sequence[Row]) -> float:
    """By how much the layout that is chosen is slower than the quickest, as a fraction."""
    return choose(rows).measured / min(row.measured for row in rows) - 1


def choose(rows: Sequence[Row]) -> Row:
    """The layout that the planner would choose: of equally quick ones the one that stores least."""
    return min(rows, key=lambda row: (row.forecast, row.memory))


def median_error(rows: Sequence[Row]) -> float:
    """Of the forecasts, without signs, as a fraction of what was measured."""
    return float(np.median([abs(row.forecast / row.measured - 1) for row in rows]))


def mesh_of(candidate: Candidate) -> Layout:
    """What its process groups follow from."""
    layout = candidate.layout
    return Layout(tp=layout.tp, pp=layout.pp, vp=layout.vp, dp=layout.dp)
