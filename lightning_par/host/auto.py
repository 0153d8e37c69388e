"""``parallel=auto``: the layout of a training chosen by the planner, for the devices that the Trainer has.

Every replica trains on the batches of the user's loader, as a Trainer has it, so that with more replicas a step has more samples:
the layout with the least time for a sample is chosen. What the user says of recomputation, of the schedule and of memory holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_par.errors import ConfigurationError
from lightning_par.host.batch import batch_size
from lightning_par.host.here import cluster_here
from lightning_par.host.option import Options
from lightning_par.host.outlook import taken_apart
from lightning_par.layout import Layout
from lightning_par.pipeline.schedules import AUTO
from lightning_par.plan.plan import Recompute
from lightning_par.plan.render import format_bytes
from lightning_par.planner import Cluster, Limits, Outlook, search
from lightning_par.planner.advice import advise
from lightning_par.planner.report import seconds
from lightning_par.zero.option import ZeroOptions

_NUM_OTHERS = 2  # that are named beside the best


@dataclass(frozen=True)
class Choice:
    """How to train.

    Attributes:
        layout: sizes of all axes, and microbatches.
        schedule: of the pipeline; None for the usual one.
        recompute: of every block of which the user says nothing.
        reasons: why, for the user.
    """

    layout: Layout
    schedule: str | None
    recompute: Recompute
    reasons: tuple[str, ...] = ()


def choose(trainer: Any, schedule: str | None, *args: Any, **kwargs: Any) -> Choice:
    """Choose for the training that a Trainer is about to start. One process calls it; the module is not changed.

    Args:
        trainer: the Trainer; its strategy says the options.
        schedule: as the user typed it.
        *args, **kwargs: what its ``fit`` was called with; the module first, then its data.

    Raises:
        ConfigurationError: the module cannot be planned for, nothing fits, or an option is not foreseen.
    """
    strategy = trainer.strategy
    options: Options = strategy.options
    what = "fit" if trainer.state.fn is None else trainer.state.fn.value  # None before the Trainer runs
    if what != "fit":
        raise ConfigurationError(
            f"parallel=auto chooses for trainer.fit, and trainer.{what} comes without it: name the layout, or fit this module first"
        )
    if options.zero != ZeroOptions():
        raise ConfigurationError(
            "parallel=auto does not foresee what options of zero do to memory and time: leave them out, or name the layout"
        )
    cluster = _limited(cluster_here(strategy.root_device, trainer.num_nodes, strategy.num_processes), options.memory_gib)
    limits = Limits(True, _words(options.overrides), None if schedule == AUTO else schedule)
    try:
        with taken_apart(trainer, lambda words: None, *args, **kwargs) as (anatomy, first):
            outlook = search(anatomy, cluster, batch_size(first), limits)
    except ConfigurationError as error:
        raise type(error)(f"parallel=auto: {error}; or name a layout, such as parallel=dp{cluster.num_devices}") from error
    best = outlook.best[0].candidate
    return Choice(best.layout, AUTO if schedule == AUTO else best.schedule, best.recompute, tuple(_reasons(outlook)))


def with_recompute(options: Options, choice: Choice) -> Options:
    """The options of a run with what was chosen for the blocks; where memory is limited, to fit that to the byte."""
    word = "auto" if options.memory_gib is not None and len(_words(options.overrides)) > 1 else choice.recompute
    single = {pattern: said for pattern, said in (options.overrides.get("recompute") or {}).items() if pattern != "*"}
    return replace(options, overrides={**options.overrides, "recompute": {"*": word, **single}})


def _limited(cluster: Cluster, memory_gib: float | None) -> Cluster:
    """The cluster with the memory that the user gives each rank."""
    if memory_gib is None:
        return cluster
    return replace(cluster, device=replace(cluster.device, memory_bytes=int(memory_gib * 2**30), reserve=0.0))


def _words(overrides: Mapping[str, Any]) -> tuple[Recompute, ...]:
    """What may be recomputed: what the user says, or as little as fits."""
    word = (overrides.get("recompute") or {}).get("*", "auto")
    return ("none", "selective", "full") if word == "auto" else (word,)


def _reasons(outlook: Outlook) -> list[str]:
    """What was chosen, by what forecast, and what comes next."""
    best, *others = outlook.best
    cluster = outlook.cluster
    found = [
        f"parallel=auto: {best.candidate.words} is the quickest of {outlook.num_considered} ways that fit {cluster.num_nodes} x "
        f"{cluster.devices_per_node} devices: a step of {best.candidate.samples} samples in {seconds(best.step_seconds)}, "
        f"{format_bytes(best.most_bytes)} on the fullest rank (rates: {cluster.source})"
    ]
    for other in others[:_NUM_OTHERS]:
        found.append(f"next: {other.candidate.words}, {other.sample_seconds / best.sample_seconds - 1:.1%} slower for each sample")
    return [*found, *advise(outlook)]
