"""What a strategy asks the planner: which layout ``auto`` stands for, and what a training should have taken beside what it took."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning_par.engine import Engine
from lightning_par.host.audit import Audit, Forecast, forecast_later
from lightning_par.host.auto import Choice, choose, with_recompute
from lightning_par.host.construction import guard_setup
from lightning_par.host.preflight import leave_inference_mode
from lightning_par.host.saving import SavingStrategy
from lightning_par.host.stopwatch import Stopwatch
from lightning_par.layout import Layout
from lightning_par.pipeline.tables import choose_schedule


class PlannedStrategy(SavingStrategy):
    """The part of `HybridParallelStrategy` that asks the planner.

    Args:
        layout, typed, timeout: as for `SavingStrategy`.
        schedule: of the pipeline, as the user typed it.

    Attributes:
        schedule: of the pipeline.
        choice: what ``auto`` stands for, on rank 0; None without it.
        stopwatch: of the training; None before there was one.
    """

    schedule: str

    def __init__(self, layout: Layout, typed: str, timeout: timedelta, schedule: str | None) -> None:
        super().__init__(layout, typed, timeout)
        self._asked_schedule = schedule
        self.choice: Choice | None = None
        self.stopwatch: Stopwatch | None = None
        self._forecast: Forecast | None = None  # of the training, on rank 0
        self._audit: Audit | None = None  # there while fitting

    # ------------------------------------------------------------------ the layout

    def choose_layout(self, trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        """Find the layout that ``auto`` stands for: that of a module that is split already; else rank 0 chooses.

        Args:
            trainer: the Trainer.
            module: the user's.
            *args, **kwargs: its data, as the Trainer's function gets them.

        Raises:
            ConfigurationError: there is none.
        """
        engine = Engine.of(module)
        if engine is not None:
            self.layout, self.schedule = engine.mesh.layout, engine.tables.schedule
        elif self.global_rank == 0:
            self.choice = choose(trainer, self._asked_schedule, module, *args, **kwargs)
            self._take(self.choice)

    def _take(self, choice: Choice) -> None:
        self.schedule, self.layout = choose_schedule(choice.schedule, choice.layout)
        self.options = with_recompute(self.options, choice)

    def agree_on_layout(self) -> None:
        """Tell the others what rank 0 has chosen. Collective over the world, before there are axes."""
        choice = self.broadcast(self.choice)
        if choice is not None and self.layout.auto:
            self._take(choice)
            leave_inference_mode(self.lightning_module.trainer)
            guard_setup(self.lightning_module)

    # ------------------------------------------------------------------ the time of a training

    def keep_for_audit(self, *rehearsed: Any) -> None:
        """Keep what a forecast takes, of what `lightning_par.host.preflight.rehearsed` yields."""
        if self.options.audit:
            self._forecast = forecast_later(self, *rehearsed)

    def begin_training(self) -> None:
        """A training begins."""
        self.stopwatch = Stopwatch(self.root_device)
        self._audit = Audit(self._forecast, self.stopwatch) if self.options.audit else None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.stopwatch is not None:
            self.stopwatch.begin_batch()

    def on_validation_start(self) -> None:
        if self.stopwatch is not None:
            self.stopwatch.interrupt()

    def on_train_end(self) -> None:
        if self._audit is not None:
            self._audit.end(self.lightning_module.trainer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.stopwatch is not None:
            self.stopwatch.interrupt()
        super().save_checkpoint(checkpoint, filepath, storage_options)
