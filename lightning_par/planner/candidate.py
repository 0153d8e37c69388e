"""The layouts that a number of devices and a batch allow, before anything is known of memory and time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lightning_par.layout import Layout
from lightning_par.pipeline.schedules import SCHEDULES, default_schedule
from lightning_par.plan.plan import Recompute
from lightning_par.planner.cluster import Cluster

MOST_CHUNKS = 8  # stages on a rank that are tried
MOST_ROWS = 64  # of a microbatch
ZERO = (0, 1, 3)  # stage 2 stores and sends what stage 1 does, where gradients are reduced once a step


@dataclass(frozen=True)
class Candidate:
    """One way to run.

    Attributes:
        layout: all axes and microbatches.
        rows: samples of each microbatch.
        schedule: of the pipeline.
        recompute: of every block.
    """

    layout: Layout
    rows: int
    schedule: str
    recompute: Recompute = "none"

    @property
    def samples(self) -> int:
        """Of a step, over all replicas."""
        return self.rows * (self.layout.microbatches or 1) * (self.layout.dp or 1)

    @property
    def words(self) -> str:
        """What to type."""
        words = [f"parallel={replace(self.layout, dp=None)}" if self.layout.world_size > 1 else f"parallel={self._single}"]
        if self.schedule != default_schedule(self.layout.vp):
            words.append(f"schedule={self.schedule}")
        if self.recompute != "none":
            words.append(f"parallel.recompute={self.recompute}")
        return " ".join(words)

    @property
    def _single(self) -> str:
        return f"dp1_mb{self.layout.microbatches}" if (self.layout.microbatches or 1) > 1 else "single"

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are computed apart."""
        return self.layout.pp > 1 and SCHEDULES[self.schedule].splits_backward


def meshes(cluster: Cluster, num_blocks: int) -> Iterator[Layout]:
    """Every tp, pp, vp and dp of all devices. tp stays on a node, pp and vp have blocks for all stages."""
    count = cluster.num_devices
    for tp in _divisors(count):
        if tp > cluster.devices_per_node or cluster.devices_per_node % tp:
            continue
        for pp in _divisors(count // tp):
            if pp > max(1, num_blocks):
                break
            for vp in _powers(MOST_CHUNKS if pp > 1 else 1):
                if pp * vp <= max(1, num_blocks):
                    yield Layout(tp=tp, pp=pp, vp=vp, dp=count // tp // pp)


def candidates(mesh: Layout, batch: int, sp: bool, schedule: str | None = None) -> Iterator[Candidate]:
    """Every way to run on a mesh, none recomputed.

    Args:
        mesh: tp, pp, vp and dp.
        batch: samples of a step on each replica.
        sp: whether hidden states are cut along the sequence, where tp is more than 1.
        schedule: the only one of a pipeline; None for all.
    """
    dp = mesh.dp or 1
    for rows in _divisors(batch):
        if rows > MOST_ROWS:
            break
        count = batch // rows
        for name in _schedules(mesh, count):
            if schedule not in (None, name) and mesh.pp > 1:
                continue
            for zero in ZERO if dp > 1 else (0,):
                if zero == 3 and SCHEDULES[name].splits_backward:
                    continue  # the weights are gone when their gradients are computed
                placement = SCHEDULES[name].placement if mesh.pp > 1 else "loop"
                layout = replace(mesh, zero=zero, microbatches=count, sp=sp and mesh.tp > 1, placement=placement)
                yield Candidate(layout, rows, name)


def _schedules(mesh: Layout, count: int) -> Iterator[str]:
    """Those that fit the stages of a rank and fill a pipeline of so many microbatches."""
    if mesh.pp == 1:
        yield default_schedule(1)
        return
    for name, schedule in SCHEDULES.items():
        fits = schedule.has_chunks(mesh.vp) and count >= schedule.least_microbatches(mesh.pp)
        if fits and name != "gpipe" and (mesh.vp == 1 or count % mesh.pp == 0):
            yield name


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]
