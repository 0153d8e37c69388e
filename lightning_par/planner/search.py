"""The best ways to run a module on a cluster, and why not the others.

All meshes are cut down in three passes: what divides, what fits (as little as needed computed again), and what may be among the
quickest by what its step cannot fall below. That is replayed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from lightning_par.errors import ConfigurationError, ModelError
from lightning_par.layout import Layout
from lightning_par.plan.plan import Recompute
from lightning_par.plan.render import format_bytes
from lightning_par.planner.anatomy import Anatomy
from lightning_par.planner.candidate import Candidate, candidates, meshes
from lightning_par.planner.cluster import Cluster
from lightning_par.planner.estimate import Estimate, Estimator

NUM_BEST = 10
_NUM_KINDS = 2 * NUM_BEST  # meshes with a ZeRO stage that are replayed at least
_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Limits:
    """What a search does not choose.

    Attributes:
        per_replica: whether every replica trains on the batch, as on what a Trainer's loader gives it, so that more replicas train
            on more samples; else they share it.
        recompute: the words that are tried where memory lacks, in order.
        schedule: the only one of a pipeline; None for all.
    """

    per_replica: bool = False
    recompute: tuple[Recompute, ...] = _RECOMPUTE
    schedule: str | None = None

    def share(self, batch: int, dp: int) -> int | None:
        """Samples of a step on each of dp replicas; None where the batch does not divide."""
        if self.per_replica:
            return batch
        return None if batch % dp else batch // dp


@dataclass(frozen=True)
class Miss:
    """A way that is not among the best.

    Attributes:
        words: what would be typed.
        reason: why not: a rule, a lack of memory, or by how much it is slower.
    """

    words: str
    reason: str


@dataclass(frozen=True)
class Outlook:
    """What a search found.

    Attributes:
        cluster: where.
        batch: samples of a step.
        best: the quickest ways, the quickest first.
        misses: the nearest others.
        num_considered: ways that divide and fit.
        alone: of each technique alone the estimate, by its name, where the module divides by it.
        measured: of the different actions that were timed how many were measured, and how many there are.
        asked: what was found of a layout that the user named, if any.
    """

    cluster: Cluster
    batch: int
    best: tuple[Estimate, ...]
    misses: tuple[Miss, ...]
    num_considered: int
    alone: tuple[tuple[str, Estimate], ...] = ()
    measured: tuple[int, int] = (0, 0)
    asked: Miss | None = None


def search(anatomy: Anatomy, cluster: Cluster, batch: int, limits: Limits = Limits()) -> Outlook:
    """Find the best ways: the quickest for each sample.

    Args:
        anatomy: of the module.
        cluster: where it is to run, on all of its devices.
        batch: samples of a step over all replicas, or of each, as the limits say.
        limits: what is not to be chosen.

    Raises:
        ConfigurationError: none divides and fits; says what is nearest.
    """
    with _collector_at_rest():
        return _search(anatomy, cluster, batch, limits)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Inside, Python does not look for circles: in tables of a hundred thousand actions there are none, and each look is at all."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _search(anatomy: Anatomy, cluster: Cluster, batch: int, limits: Limits) -> Outlook:
    estimator, misses = Estimator(anatomy, cluster), list[Miss]()
    divided = _divided(anatomy, cluster, batch, limits, misses)
    fitting = list[tuple[float, Candidate]]()
    least: tuple[int, Candidate] | None = None
    for mesh, sp, samples in divided:
        short: tuple[int, Candidate] | None = None
        found = len(fitting)
        for plain in candidates(mesh, samples, sp, limits.schedule):
            fits, lowest = _fit(estimator, plain, limits.recompute)
            if fits is not None:
                fitting.append((estimator.quick(fits)[0] / fits.samples, fits))
            elif short is None or lowest < short[0]:
                short = lowest, plain
        if short is not None and len(fitting) == found:
            lack = format_bytes(short[0] - cluster.device.usable_bytes)
            misses.append(Miss(short[1].words, f"does not fit: the fullest rank lacks {lack} even with every block recomputed"))
            least = min((short, least) if least is not None else (short,), key=lambda each: each[0])
    best = _replayed(estimator, fitting, cluster, limits.recompute)
    if not best:
        raise _nothing(cluster, batch, misses, least)
    misses += _slower(best)
    alone = _alone(estimator, batch, limits)
    return Outlook(cluster, batch, tuple(best[:NUM_BEST]), tuple(misses), len(fitting), alone, estimator.clock.coverage)


def _divided(anatomy: Anatomy, cluster: Cluster, batch: int, limits: Limits, misses: list[Miss]) -> list[tuple[Layout, bool, int]]:
    """The meshes that the module and the batch divide by, whether the sequence is cut over tp, and a replica's samples."""
    found, refused = list[tuple[Layout, bool, int]](), set[int]()
    for mesh in meshes(cluster, anatomy.num_blocks):
        if mesh.tp in refused:
            continue
        if mesh.pp > 1 and anatomy.pipeline_error is not None:
            continue
        samples = limits.share(batch, mesh.dp or 1)
        if samples is None:
            if mesh.vp == 1:
                misses.append(
                    Miss(f"parallel={replace(mesh, dp=None)}", f"does not divide: {batch} samples over {mesh.dp} replicas")
                )
            continue
        try:
            sp = mesh.tp > 1 and _has_sp(anatomy, mesh.tp)
            if mesh.tp > 1 and not any(parameter.spec.split for parameter in anatomy.plan(mesh.tp, sp).parameters):
                raise ModelError("no layer can be split over tp")
            found.append((mesh, sp, samples))
        except ConfigurationError as error:
            refused.add(mesh.tp)
            misses.append(Miss(f"parallel=tp{mesh.tp}", f"does not divide: {error}"))
    if anatomy.pipeline_error is not None:
        misses.append(Miss("parallel=pp2", f"no pipeline: {anatomy.pipeline_error}"))
    return found


def _has_sp(anatomy: Anatomy, tp: int) -> bool:
    """Whether the sequence can be cut.

    Raises:
        ConfigurationError: not even the layers can.
    """
    try:
        anatomy.plan(tp, True)
    except ConfigurationError:
        anatomy.plan(tp, False)
        return False
    return True


def _fit(estimator: Estimator, plain: Candidate, words: Sequence[Recompute]) -> tuple[Candidate | None, int]:
    """The candidate with as little computed again as fits, and the least bytes of the fullest rank."""
    usable = estimator.cluster.device.usable_bytes
    lowest = 0
    for word in words if estimator.anatomy.num_blocks else _RECOMPUTE[:1]:
        tried = replace(plain, recompute=word)
        _, lowest = estimator.quick(tried)
        if lowest <= usable:
            return tried, lowest
    return None, lowest


def _replayed(
    estimator: Estimator, fitting: list[tuple[float, Candidate]], cluster: Cluster, words: Sequence[Recompute]
) -> list[Estimate]:
    """Of each mesh and ZeRO stage the best microbatches and schedule, replayed; the best first.

    What cannot be quicker than one of its kind that has been replayed is not, and no more kinds are than can be among the best.
    """
    kinds: dict[object, list[tuple[float, Candidate]]] = {}
    for least, candidate in sorted(fitting, key=lambda each: each[0]):
        layout = candidate.layout
        kinds.setdefault((layout.tp, layout.pp, layout.zero), []).append((least, candidate))
    found = list[Estimate]()
    for alike in kinds.values():
        if len(found) >= _NUM_KINDS and alike[0][0] > sorted(found, key=_merit)[NUM_BEST - 1].sample_seconds:
            break
        best: Estimate | None = None
        for least, candidate in alike:
            if best is not None and least > best.sample_seconds:
                break
            tried = _fitted(estimator, candidate, cluster.device.usable_bytes, words)
            if tried is not None and (best is None or _merit(tried) < _merit(best)):
                best = tried
        found += [] if best is None else [best]
    return sorted(found, key=_merit)


def _merit(estimate: Estimate) -> tuple[float, int]:
    """The quicker for each sample, and of equal ones the one that stores less."""
    return estimate.sample_seconds, estimate.most_bytes


def _fitted(estimator: Estimator, candidate: Candidate, usable: int, words: Sequence[Recompute]) -> Estimate | None:
    """With more recomputation where the replay stores more than the closed form said."""
    for word in words[words.index(candidate.recompute) :] if candidate.recompute in words else words[:1]:
        estimate = estimator.estimate(replace(candidate, recompute=word))
        if estimate.most_bytes <= usable:
            return estimate
    return None


def _slower(best: Sequence[Estimate]) -> list[Miss]:
    """Of the replayed ones those after the best, each with what it loses by."""
    return [Miss(estimate.candidate.words, slower_by(estimate, best[0])) for estimate in best[NUM_BEST : 2 * NUM_BEST]]


def slower_by(estimate: Estimate, first: Estimate) -> str:
    """By how much of the best one's time for a sample, and what most of that is."""
    scale = first.candidate.samples / estimate.candidate.samples
    lost, part = max((seconds * scale - first.parts[name], name) for name, seconds in estimate.parts.items())
    share = estimate.sample_seconds / first.sample_seconds - 1
    return f"slower by {share:.1%}, {lost * 1e3:.3g} ms of it in {part}"


def _alone(estimator: Estimator, batch: int, limits: Limits) -> tuple[tuple[str, Estimate], ...]:
    """Each technique alone on as many devices as it can use."""
    found = []
    anatomy, cluster = estimator.anatomy, estimator.cluster
    count = cluster.num_devices
    shapes = {"data": Layout(dp=count), "zero1": Layout(dp=count, zero=1), "zero3": Layout(dp=count, zero=3)}
    shapes["tensor"] = Layout(tp=min(cluster.devices_per_node, count), dp=1)
    shapes["pipeline"] = Layout(pp=min(count, anatomy.num_blocks or 1), dp=1)
    for name, layout in shapes.items():
        samples = limits.share(batch, layout.dp or 1)
        if samples is None or layout.world_size == 1 or (layout.pp > 1 and anatomy.pipeline_error is not None):
            continue
        rows = max(1, samples // max(1, 4 * layout.pp))
        while samples % rows:
            rows -= 1
        layout = replace(layout, microbatches=samples // rows)
        try:
            layout = replace(layout, sp=layout.tp > 1 and _has_sp(anatomy, layout.tp))
            found.append((name, estimator.estimate(Candidate(layout, rows, "1f1b"))))
        except ConfigurationError:
            continue
    return tuple(found)


def _nothing(cluster: Cluster, batch: int, misses: list[Miss], least: tuple[int, Candidate] | None) -> ConfigurationError:
    if least is None:
        reasons = "; ".join(f"{miss.words}: {miss.reason}" for miss in misses[:3])
        return ModelError(
            f"batch={batch} on {cluster.num_devices} devices of {cluster.name}: nothing divides: {reasons}: change batch"
        )
    lack, candidate = least
    return ModelError(
        f"batch={batch} on {cluster.num_devices} devices of {cluster.name}: nothing fits. {candidate.words} with every block "
        f"recomputed comes nearest: its fullest rank stores {format_bytes(lack)}, and a device has "
        f"{format_bytes(cluster.device.usable_bytes)}: use more nodes"
    )
