"""The callback that measures a training: how fast, how busy, how full; logged, in the progress bar, and drawn at its end.

What it costs: on each step a few counters of the host. On one that is logged the host waits for the device, ranks gather nine
numbers of each, a pipeline's actions are timed, and gradients that are not clipped by norm are read once more, their norm reduced.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_par.engine import Engine
from lightning_par.errors import ConfigurationError, DataError
from lightning_par.host.batch import batch_size
from lightning_par.host.here import peak_flops_here
from lightning_par.host.measurement import Seen, measure
from lightning_par.host.monitor_report import Interval, Record
from lightning_par.host.namespace import bind, root_in_use
from lightning_par.host.stopwatch import peak_bytes
from lightning_par.pipeline.clock import Clock, CudaClock, WallClock
from lightning_par.private.lightning import logged_step
from lightning_par.runtime.nested import tokens_of

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback as Host
else:
    Host = object

PREFIX = "monitor/"
_IN_BAR = {"tokens_per_second": "tokens/s", "samples_per_second": "samples/s", "mfu_fraction": "MFU", "bubble_fraction": "bubble"}


class Monitor(Host):
    """Measures a training once every ``log_every_n_steps`` and logs it under ``monitor/``, with the unit in each name.

    A `HybridParallelStrategy` adds one to a Trainer that has none, unless it is told ``monitor=False``. Works with the Trainer of
    ``pytorch_lightning`` and of ``lightning.pytorch``. See docs/monitor.md for what each name means.

    Args:
        folder: where ``monitor.png`` is written; by default the Trainer's ``log_dir``, or its ``default_root_dir`` where a logger
            has none. Without a logger and a folder, and in a ``fast_dev_run``, none is written.
        peak_tflops: products of one device in a second, in 1e12, that count as all it could do, for MFU; by default those of its
            datasheet, where its name is known. Those of a CPU are not.

    Raises:
        ConfigurationError: ``peak_tflops`` is not positive; or, when the training starts, the strategy is another one.
    """

    root = ""  # the Lightning namespace, set by `bind`

    def __new__(cls, *args: Any, **kwargs: Any) -> Monitor:
        """Make a callback of the Lightning namespace that the caller uses: their classes are disjoint."""
        mixin: Any = cls
        return object.__new__(mixin if cls.root else bind(mixin, root_in_use(sys._getframe(1)), "callbacks.Callback"))

    def __init__(self, folder: str | Path | None = None, peak_tflops: float | None = None) -> None:
        super().__init__()
        if peak_tflops is not None and not peak_tflops > 0:
            raise ConfigurationError(
                f"Monitor(peak_tflops={peak_tflops}): what a device could multiply in a second, in 1e12 operations, must be "
                "positive: use the number of its datasheet, such as 989, or leave it out"
            )
        self._folder, self._peak_tflops = folder, peak_tflops
        self._clock: Clock[Any] | None = None  # of the pipeline's actions; None without a pipeline
        self._step: int | None = None  # under which this batch is logged

    # ------------------------------------------------------------------ while it trains

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count. Refuses a strategy that does not tell what is counted."""
        engine = Engine.of(pl_module)
        if engine is None:
            raise ConfigurationError(
                f"Monitor measures a HybridParallelStrategy, and the Trainer's strategy is {type(trainer.strategy).__name__}: use "
                "that one, or remove the callback"
            )
        strategy, precision = trainer.strategy, trainer.strategy.precision
        self._clock = None
        if strategy.layout.pp > 1:
            self._clock = CudaClock() if engine.device.type == "cuda" else WallClock()
        self._peak_flops = peak_flops_here(engine.device, precision.autocast or precision.parameters or torch.float32)
        if self._peak_tflops is not None:
            self._peak_flops = self._peak_tflops * 1e12
        self._seen_step, self._record = trainer.global_step, Record(strategy.plan, trainer.log_every_n_steps)
        self._forget()

    def _forget(self) -> None:
        """A new interval."""
        self._tokens = self._samples = self._num_steps = 0
        self._sent = dict.fromkeys(("tp", "pp", "dp"), 0.0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note where counters are; have a batch that is logged looked at more closely."""
        strategy = trainer.strategy
        self._step = logged_step(trainer)
        if self._step is not None:
            strategy.updates.finds_norm = True
            if self._clock is not None:
                self._clock.restart()
                strategy.engine.observers.append(self._clock)
        self._sent_before = strategy.engine.sent_bytes

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count; log where the Trainer does. Collective over the world then."""
        for axis, sent in trainer.strategy.engine.sent_bytes.items():
            self._sent[axis] += sent - self._sent_before[axis]
        samples = _samples_in(batch)
        self._samples += samples
        self._tokens += samples * (tokens_of(batch) or 0)
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            self._num_steps += 1
        if self._step is not None:
            self._log(trainer, self._step, _loss_in(outputs))
            self._forget()

    def _log(self, trainer: Any, step: int, loss: float | None) -> None:
        strategy = trainer.strategy
        busy, whole = self._pipeline_seconds(trainer)
        if strategy.root_device.type == "cuda":
            torch.cuda.synchronize(strategy.root_device)
        seen = Seen(
            self._tokens, self._samples, strategy.stopwatch.lap(), peak_bytes(strategy.root_device), busy, whole,
            *(self._sent[axis] for axis in ("tp", "pp", "dp")),
        )  # fmt: skip
        numbers = torch.tensor(astuple(seen), dtype=torch.float64, device=strategy.root_device)
        ranks = [Seen(*rank) for rank in torch.stack(strategy.mesh.world.all_gather(numbers)).tolist()]
        found = measure(ranks, strategy.layout, max(1, self._num_steps), strategy.plan.work, self._peak_flops)
        if strategy.updates.grad_norm is not None:
            found["gradient_norm"] = float(strategy.updates.grad_norm)
        if strategy.engine.loss_scale is not None:
            found["loss_scale"] = strategy.engine.loss_scale.scale
        for logger in trainer.loggers:
            logger.log_metrics({PREFIX + name: value for name, value in found.items()}, step=step)
        has_tokens = "tokens_per_second" in found
        shown = {word: found[name] for name, word in _IN_BAR.items() if name in found and not (has_tokens and word == "samples/s")}
        trainer.progress_bar_metrics.update(shown)
        self._record.intervals.append(Interval(step + 1, loss, found))
        self._record.memory = [rank.peak_bytes for rank in ranks]

    def _pipeline_seconds(self, trainer: Any) -> tuple[float, float]:
        """Of the batch that was recorded: for how long this rank worked, and from its first action to its last."""
        spans = () if self._clock is None else self._clock.spans()
        self._look_away(trainer)
        if not spans:
            return 0.0, 0.0
        first, last = spans[0], spans[-1]
        busy = sum(span.end_seconds - span.start_seconds for span in spans)
        return busy, last.end_seconds - (first.start_seconds - first.wait_seconds)

    def _look_away(self, trainer: Any) -> None:
        """The next batches are not looked at closely."""
        trainer.strategy.updates.finds_norm = False
        observers = trainer.strategy.engine.observers
        observers[:] = [observer for observer in observers if observer is not self._clock]

    # ------------------------------------------------------------------ when it ends

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say how it went, on rank 0. Nothing is said of a training in which nothing was logged. Collective over the world."""
        folder = self._folder
        if folder is None and trainer.loggers and not trainer.fast_dev_run:
            folder = trainer.log_dir or trainer.default_root_dir  # every rank asks: the answer is broadcast
        if self._record.intervals and trainer.is_global_zero:
            print(self._record.render(), flush=True)
            if folder is not None:
                _draw(self._record, Path(folder, "monitor.png"))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave a batch that has failed."""
        if self._step is not None:
            self._look_away(trainer)


def monitor_training(trainer: Any, root: str) -> None:
    """Have a Trainer that is about to fit measured, where it is not already, and has not asked for nothing but speed.

    Args:
        trainer: the Trainer.
        root: its Lightning namespace.
    """
    if not trainer.barebones and not any(isinstance(callback, Monitor) for callback in trainer.callbacks):
        trainer.callbacks.append(bind(Monitor, root, "callbacks.Callback")())


def _draw(record: Record, path: Path) -> None:
    """A training does not fail because its picture cannot be written."""
    try:
        record.draw(path)
    except OSError as error:
        rank_zero_warn(f"Monitor: {path} cannot be written ({error.strerror}), so there is no picture: name another folder")
    else:
        rank_zero_info(f"Monitor: {path}")


def _samples_in(batch: Any) -> int:
    try:
        return batch_size(batch)
    except DataError:  # it has no tensor
        return 1


def _loss_in(outputs: Any) -> float | None:
    """What a training step returned; None where that was no loss, as in manual optimization."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return float(loss) if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None
