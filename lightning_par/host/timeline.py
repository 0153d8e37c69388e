"""The callback that records what every rank of the pipeline did in chosen steps, and draws it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_par.engine import Engine
from lightning_par.errors import ConfigurationError
from lightning_par.host.namespace import bind, root_in_use
from lightning_par.layout import Layout
from lightning_par.picture import write_picture
from lightning_par.picture.recording import Recording, picture_of, split_rounds
from lightning_par.pipeline.clock import Clock, CudaClock, WallClock

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback as Host
else:
    Host = object

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class PipelineTimeline(Host):
    """Pictures of what every rank of the pipeline did in some steps: ``timeline.html``, ``timeline.png``, ``trace.json``.

    Works with the Trainer of ``pytorch_lightning`` and of ``lightning.pytorch``, and a `HybridParallelStrategy` with pp.
    The page shows every recorded batch and replica, the PNG the first; the trace is for chrome://tracing and Perfetto.

    Args:
        steps: which optimizer steps, as ``trainer.global_step`` counts them: from 0. The first few are slower than the rest.
        folder: where the files are written; by default ``timeline`` in the Trainer's ``log_dir``.

    Raises:
        ConfigurationError: ``steps`` names none; or, when the Trainer starts, there is no pipeline.
    """

    root = ""  # the Lightning namespace, set by `bind`

    def __new__(cls, *args: Any, **kwargs: Any) -> PipelineTimeline:
        """Make a callback of the Lightning namespace that the caller uses: their classes are disjoint."""
        mixin: Any = cls
        return object.__new__(mixin if cls.root else bind(mixin, root_in_use(sys._getframe(1)), "callbacks.Callback"))

    def __init__(self, steps: Sequence[int] = (5, 6), folder: str | Path | None = None) -> None:
        super().__init__()
        self.steps = frozenset(steps)
        if not self.steps or not all(isinstance(step, int) and step >= 0 for step in self.steps):
            raise ConfigurationError(
                f"PipelineTimeline(steps={steps!r}): which optimizer steps are recorded, counted from 0: give at least one, "
                "such as [5, 6]"
            )
        self._folder = folder
        self._clock: Clock[Any] | None = None  # of the batch that is being recorded
        self._step = ""
        self._recordings: list[Recording] = []
        self._is_done = False

    def check_layout(self, layout: Layout) -> None:
        """Refuse a layout without a pipeline; before any process is started.

        Raises:
            ConfigurationError: pp is 1.
        """
        if layout.pp == 1:
            raise ConfigurationError(
                f"PipelineTimeline records the ranks of a pipeline, and parallel={layout} has none (pp 1): add pp2 or more, or "
                "remove the callback"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a strategy that has no pipeline."""
        if Engine.of(pl_module) is None:
            raise ConfigurationError(
                "PipelineTimeline records the ranks of a pipeline, and the Trainer's strategy is "
                f"{type(trainer.strategy).__name__}: use HybridParallelStrategy with pp2 or more, or remove the callback"
            )
        self._recordings, self._is_done, self._first = [], False, trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start to record. Collective over the world: all ranks begin to count together."""
        if trainer.global_step not in self.steps:
            return
        self._step = f"step {trainer.global_step}" + (f", batch {batch_idx}" if trainer.accumulate_grad_batches > 1 else "")
        self._clock = CudaClock() if trainer.strategy.root_device.type == "cuda" else WallClock()
        trainer.strategy.barrier("timeline")
        self._clock.zero()
        trainer.strategy.engine.observers.append(self._clock)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep what was recorded; draw it after the last of the steps. Collective over the world."""
        if self._clock is not None:
            trainer.strategy.engine.observers.remove(self._clock)
            rounds = split_rounds(self._clock.spans())
            for number, spans in enumerate(rounds):
                step = self._step + (f", run {number}" if len(rounds) > 1 else "")
                self._recordings.append(Recording(step, _machine(), self._clock.zero_ns, spans))
            self._clock = None
        if not self._is_done and trainer.global_step > max(self.steps):
            self._draw(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw what there is of steps that a training did not reach. Collective over the world."""
        if not self._is_done:
            self._draw(trainer)

    def _draw(self, trainer: Any) -> None:
        self._is_done = True
        if not self._recordings:
            rank_zero_warn(
                f"PipelineTimeline recorded nothing: this training began at step {self._first} and is at step "
                f"{trainer.global_step}, and none of steps={sorted(self.steps)} is between: choose steps that it runs"
            )
            return
        folder = self._folder or Path(trainer.log_dir or trainer.default_root_dir, "timeline")  # every rank asks: it is broadcast
        ranks = gather(self._recordings, trainer.strategy.mesh.world.group)
        self._recordings = []
        if ranks is not None:
            plan, schedule = trainer.strategy.plan, trainer.strategy.schedule
            picture = picture_of(f"{plan.module}: {schedule}, {plan.layout}", plan.layout, ranks)
            write_picture(picture, Path(folder))
            rank_zero_info(f"PipelineTimeline: {Path(folder) / 'timeline.html'}")


def gather(recordings: list[Recording], group: dist.ProcessGroup) -> list[list[Recording]] | None:
    """What every rank recorded, on the first rank; None on the others. Collective over ``group``."""
    ranks: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(recordings, ranks, dst=0, group=group)
    return ranks


def _machine() -> str:
    """Names the machine whose clock this process reads: containers of one machine share it, whatever they are called."""
    return _BOOT.read_text().strip() if _BOOT.exists() else platform.node()
