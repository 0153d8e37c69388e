"""What a training took beside what the planner says that it takes: the time of a step, and the memory of the fullest rank.

A step counts from the start of a batch to the start of the next, by the `Stopwatch` that the monitor goes by too. The first ones do
not count. The forecast is made when the training is over, so that none waits for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_par.errors import ConfigurationError
from lightning_par.host.here import cluster_here
from lightning_par.host.outlook import Subject, values_unknown
from lightning_par.host.stopwatch import Stopwatch, peak_bytes
from lightning_par.pipeline.schedules import AUTO, default_schedule
from lightning_par.plan.plan import Recompute
from lightning_par.plan.render import format_bytes
from lightning_par.planner.candidate import Candidate
from lightning_par.planner.estimate import Estimate, Estimator
from lightning_par.planner.report import seconds
from lightning_par.zero.option import ZeroOptions

LEAST_SECONDS, LEAST_STEPS = 10.0, 20  # of shorter trainings nothing is said
Forecast = Callable[[], tuple[Estimate, str]]
_NUM_WARM = 3  # steps in which memory is found, and code compiled


class Audit:
    """Says at the end of a training how it went. Every rank has one, and calls it alike.

    Args:
        forecast: makes the forecast and says where its rates are from, or raises a `ConfigurationError` where there is none; None
            on all ranks but the first.
        stopwatch: of the training.
    """

    def __init__(self, forecast: Forecast | None, stopwatch: Stopwatch) -> None:
        self._forecast, self._stopwatch = forecast, stopwatch

    def end(self, trainer: Any) -> None:
        """Say what was found and log it, where there were enough steps. Collective over the world."""
        peak = torch.tensor(peak_bytes(trainer.strategy.root_device), dtype=torch.int64)
        most = int(trainer.strategy.reduce(peak, reduce_op=dist.ReduceOp.MAX))
        steps = self._stopwatch.batches[_NUM_WARM:]
        if self._forecast is None or len(steps) < LEAST_STEPS or sum(steps) < LEAST_SECONDS:
            return
        try:
            estimate, source = self._forecast()
        except Exception as error:  # the training is over and good, whatever the planner makes of its module
            what = error if isinstance(error, ConfigurationError) else f"{type(error).__name__}: {error}"
            rank_zero_info(f"Forecast: there is none: {what}")
            return
        found = _compare(estimate, statistics.median(steps), most, trainer)
        rank_zero_info(_describe(found, len(steps), trainer.strategy.root_device, source))
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)


def forecast_later(strategy: Any, twin: Any, first: Any, optimizers: Sequence[Any] | None) -> Forecast:
    """What `Audit` asks for at the end of a training; until then it keeps the module without its weights.

    Args:
        strategy: of the run; its plan is there when the forecast is made.
        twin, first, optimizers: what `rehearsed` yields.
    """
    try:
        subject: Subject | ConfigurationError = Subject.of(twin, first, optimizers, strategy).without_weights()
    except ConfigurationError as error:
        subject = error

    def forecast() -> tuple[Estimate, str]:
        if isinstance(subject, ConfigurationError):
            raise subject
        cluster = cluster_here(strategy.root_device, strategy.num_nodes, strategy.num_processes)
        with values_unknown(subject.module):
            anatomy = subject.take_apart(lambda words: None)
            return Estimator(anatomy, cluster).estimate(_candidate(subject, strategy)), cluster.source

    return forecast


def _candidate(subject: Subject, strategy: Any) -> Candidate:
    """The run as the planner knows it.

    Raises:
        ConfigurationError: it has what the planner does not know.
    """
    plan = strategy.plan
    words: set[Recompute] = {"none"} if plan.chain is None else set(plan.chain.recompute)
    if len(words) > 1:
        raise ConfigurationError("some blocks are recomputed and others are not, which the planner does not know")
    if strategy.options.zero != ZeroOptions():
        raise ConfigurationError("there are options of zero, which the planner does not know")
    schedule = default_schedule(plan.layout.vp) if strategy.schedule == AUTO else strategy.schedule
    return Candidate(plan.layout, -(-subject.samples // (plan.layout.microbatches or 1)), schedule, words.pop())


def _compare(estimate: Estimate, measured: float, most: int, trainer: Any) -> dict[str, float]:
    """What is logged."""
    apart = (1 - 1 / trainer.accumulate_grad_batches) * (estimate.parts["dp"] + estimate.parts["optimizer"])
    return {
        "forecast/step_seconds": estimate.step_seconds - apart,
        "forecast/step_seconds_measured": measured,
        "forecast/peak_bytes": float(estimate.most_bytes),
        "forecast/peak_bytes_measured": float(most),
    }


def _describe(found: dict[str, float], num_steps: int, device: torch.device, source: str) -> str:
    took, said, most, stored = (
        found[f"forecast/{key}"] for key in ("step_seconds_measured", "step_seconds", "peak_bytes_measured", "peak_bytes")
    )
    held, tensors = format_bytes(int(most)), format_bytes(int(stored))
    if device.type == "cuda":
        memory = f"the fullest rank stored {held}, {tensors} by the forecast ({_beside(most, stored)})"
    else:
        memory = f"the largest process had {held} with interpreter and libraries, tensors {tensors} by the forecast"
    time = f"a step took {seconds(took)} (median of {num_steps}), {seconds(said)} by the forecast ({_beside(took, said)})"
    return f"Forecast: {time}; {memory}; rates: {source}"


def _beside(measured: float, forecast: float) -> str:
    """``+3.1%``; ``12 times that`` where it is far away."""
    ratio = measured / forecast
    return f"{ratio - 1:+.1%}" if 0.5 <= ratio <= 2 else f"{ratio:.2g} times that"
