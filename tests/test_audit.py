"""A training beside its forecast: which steps count, what is said, and that the forecast is the planner's for this very run."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lightning_par import HybridParallelStrategy, deferred_init
from lightning_par.errors import ModelError
from lightning_par.host import audit
from lightning_par.host.audit import Audit
from lightning_par.host.here import cluster_here
from lightning_par.host.outlook import taken_apart
from lightning_par.host.stopwatch import Stopwatch
from lightning_par.layout import parse_layout
from lightning_par.planner.candidate import Candidate
from lightning_par.planner.estimate import Estimate, Estimator
from tests.models import gpt, make_batch
from tests.planning import loader_of, quiet_trainer
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def _nothing_is_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_par.host.here.cached_of_device", lambda name: [])


class Logger:
    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((metrics, step))


def trainer_with(logger: Logger, accumulate: int = 1) -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda tensor, reduce_op: tensor)
    return SimpleNamespace(strategy=strategy, loggers=[logger], global_step=50, accumulate_grad_batches=accumulate)


def forecast() -> tuple[Any, str]:
    parts = {"dp": 0.2, "optimizer": 0.3}
    return SimpleNamespace(step_seconds=1.0, parts=parts, most_bytes=2**30), "a made-up device"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("lightning_par.host.stopwatch.time.perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(audit, "rank_zero_info", lines.append)
    return lines


def run(clock: SimpleNamespace, times: list[float], stopwatch: Stopwatch | None = None) -> Stopwatch:
    stopwatch = stopwatch or Stopwatch(torch.device("cpu"))
    stopwatch.begin_batch()
    for each in times:
        clock.now += each
        stopwatch.begin_batch()
    return stopwatch


def test_the_median_of_the_steps_that_are_warm(clock: SimpleNamespace, said: list[str]) -> None:
    logger, stopwatch = Logger(), run(clock, [90.0, 80.0, 70.0, *[1.25] * 13])
    stopwatch.interrupt()
    clock.now += 1000.0  # a validation
    Audit(forecast, run(clock, [1.25] * 10, stopwatch)).end(trainer_with(logger))
    ((metrics, step),) = logger.logged
    assert step == 50 and metrics["forecast/step_seconds_measured"] == 1.25 and metrics["forecast/step_seconds"] == 1.0
    assert metrics["forecast/peak_bytes"] == 2**30 and metrics["forecast/peak_bytes_measured"] > 2**20
    assert "a step took 1.25 s (median of 23), 1 s by the forecast (+25.0%); the largest process had" in said[0]
    assert "tensors 1.0 GiB by the forecast; rates: a made-up device" in said[0]


def test_of_a_batch_that_is_accumulated_the_rest_of_the_step_is_shared(clock: SimpleNamespace) -> None:
    logger = Logger()
    Audit(forecast, run(clock, [1.0] * 40)).end(trainer_with(logger, accumulate=4))
    assert logger.logged[0][0]["forecast/step_seconds"] == pytest.approx(1.0 - 0.75 * 0.5)


@pytest.mark.parametrize("times", [[1.0] * (audit.LEAST_STEPS + 2), [audit.LEAST_SECONDS / 100] * 90])
def test_of_few_steps_nothing_is_said(clock: SimpleNamespace, times: list[float]) -> None:
    logger = Logger()
    Audit(forecast, run(clock, times)).end(trainer_with(logger))
    assert not logger.logged


def test_what_cannot_be_foreseen_ends_no_training(clock: SimpleNamespace, said: list[str]) -> None:
    for error, words in ((ModelError("it has two optimizers"), "it has two optimizers"), (KeyError("x"), "KeyError: 'x'")):

        def refuse(error: Exception = error) -> tuple[Estimate, str]:
            raise error

        logger = Logger()
        Audit(refuse, run(clock, [1.0] * 40)).end(trainer_with(logger))
        assert not logger.logged and said.pop() == f"Forecast: there is none: {words}"


def test_far_away_is_said_as_a_multiple() -> None:
    assert [audit._beside(measured, 2.0) for measured in (2.2, 1.9, 10.0, 0.5)] == [
        "+10.0%",
        "-5.0%",
        "5 times that",
        "0.25 times that",
    ]


def _train(rank: int, world_size: int, word: str, options: dict[str, Any]) -> dict[str, float]:
    audit.LEAST_SECONDS, audit.LEAST_STEPS = 0.0, 1
    loader = loader_of(*(make_batch(step, 8) for step in range(6)))
    logger = Logger()
    strategy = HybridParallelStrategy(word, print_plan=False, **options)
    trainer = quiet_trainer(word, world_size, strategy=strategy, max_steps=6, use_distributed_sampler=False)
    real, found = Audit.end, {}

    def end(self: Audit, host: Any) -> None:
        host.loggers = [logger]
        real(self, host)
        host.loggers = []

    with deferred_init() if word.startswith("pp") else nullcontext():
        module = gpt()
    with patch.object(Audit, "end", end):
        trainer.fit(module, loader)
    for metrics, _ in logger.logged:
        found.update(metrics)
    return found


@pytest.mark.parametrize(("word", "options"), [("pp2_mb4", {"schedule": "gpipe"}), ("tp2_mb2", {"recompute": "full"})])
def test_the_forecast_is_that_of_this_run(word: str, options: dict[str, Any]) -> None:
    first, second = run_ranks(_train, 2, word, options)
    assert not second and first["forecast/step_seconds_measured"] > 0
    layout = parse_layout(word).resolve(2)
    with taken_apart(quiet_trainer("single", 1), print, gpt(), loader_of(make_batch(0, 8))) as (anatomy, _):
        candidate = Candidate(
            layout, 8 // (layout.microbatches or 1), options.get("schedule", "1f1b"), options.get("recompute", "none")
        )
        expected = Estimator(anatomy, cluster_here(torch.device("cpu"), 1, 2)).estimate(candidate)
    assert first["forecast/step_seconds"] == pytest.approx(expected.step_seconds)
    assert first["forecast/peak_bytes"] == expected.most_bytes


def test_it_can_be_turned_off() -> None:
    assert not HybridParallelStrategy("single", audit=False).options.audit
