"""A layout that the user names, beside those that a search found: why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lightning_par.errors import ConfigurationError, ModelError
from lightning_par.layout import Layout
from lightning_par.plan.plan import Recompute
from lightning_par.plan.render import format_bytes
from lightning_par.planner.candidate import Candidate, candidates
from lightning_par.planner.estimate import Estimate, Estimator
from lightning_par.planner.report import seconds
from lightning_par.planner.search import Miss, Outlook, slower_by

_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


def judge(estimator: Estimator, outlook: Outlook, layout: Layout) -> Miss:
    """Why a layout is not the best. Chosen is what it leaves open: microbatches, schedule, and recomputation where memory lacks.

    Args:
        estimator: of the search.
        outlook: what that found, for samples that replicas share.
        layout: as the user typed it.
    """
    cluster = outlook.cluster
    try:
        tried = list(_ways(estimator, layout.resolve(cluster.num_devices), outlook.batch))
    except ConfigurationError as error:
        return Miss(f"parallel={layout}", f"does not divide: {error}")
    fitting = [estimate for estimate in tried if estimate.most_bytes <= cluster.device.usable_bytes]
    if not fitting:
        least = min(tried, key=lambda estimate: estimate.most_bytes)
        lack = format_bytes(least.most_bytes - cluster.device.usable_bytes)
        return Miss(least.candidate.words, f"does not fit: the fullest rank lacks {lack} even so")
    best = min(fitting, key=lambda estimate: estimate.step_seconds)
    found = f"a step in {seconds(best.step_seconds)}, {format_bytes(best.most_bytes)} on the fullest rank"
    if best.step_seconds <= outlook.best[0].step_seconds:
        return Miss(best.candidate.words, f"as quick as the best: {found}")
    return Miss(best.candidate.words, f"{slower_by(best, outlook.best[0])}: {found}")


def _ways(estimator: Estimator, mesh: Layout, batch: int) -> Iterator[Estimate]:
    """All ways to run a layout, of each with as little computed again as fits.

    Raises:
        ConfigurationError: the module or the batch does not divide by it.
    """
    anatomy, dp = estimator.anatomy, mesh.dp or 1
    if batch % dp:
        raise ModelError(f"{batch} samples over {dp} replicas")
    if mesh.pp > 1 and anatomy.pipeline_error is not None:
        raise anatomy.pipeline_error
    if mesh.num_stages > max(1, anatomy.num_blocks):
        raise ModelError(f"{mesh.num_stages} stages, and the model has {anatomy.num_blocks} blocks")
    anatomy.plan(mesh.tp, mesh.sp)
    plain = candidates(replace(mesh, zero=0, microbatches=None), batch // dp, mesh.sp)
    found = [candidate for candidate in plain if _is_one_of(candidate, mesh)]
    if not found:
        raise ModelError(f"{batch // dp} samples of a replica into {mesh.microbatches} microbatches")
    for candidate in found:
        yield _fitted(estimator, candidate)


def _is_one_of(candidate: Candidate, mesh: Layout) -> bool:
    """Of ZeRO-2, which is not searched, the ways of ZeRO-1, which stores and sends the same."""
    zero = 1 if mesh.zero == 2 else mesh.zero
    return candidate.layout.zero == zero and mesh.microbatches in (None, candidate.layout.microbatches)


def _fitted(estimator: Estimator, candidate: Candidate) -> Estimate:
    for word in _RECOMPUTE if estimator.anatomy.num_blocks else _RECOMPUTE[:1]:
        estimate = estimator.estimate(replace(candidate, recompute=word))
        if estimate.most_bytes <= estimator.cluster.device.usable_bytes:
            break
    return estimate
