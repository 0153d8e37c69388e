"""Runs that are asked to stop: they finish the step, save, and end with exit code 0.

    the signal                                 what all ranks do at the end of the step
    SIGTERM                                    save ``preempted.ckpt`` and end
    SLURM's, where Lightning is to requeue     what Lightning's handler does: save where the requeued job looks, and requeue; end
    SLURM's otherwise                          as on SIGTERM

Lightning's own handlers do it inside the handler, at whatever line each rank was, where their collectives meet others. Here a
handler notes the signal and nothing else, and ranks agree at the end of each step: one that was told is enough. That costs a
reduction of one number on the host, 0.4 ms for 2 processes on 2 busy cores; Lightning broadcasts one on the device for every batch.

A validation that runs is finished, and the step after it: Lightning does not go on from inside of one to the same end.

A second SIGTERM ends this rank at once, and with it the run. Before training begins, the first does.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightning_par.host.launch.ending import SAME_SIGNAL_SECONDS, Stopped, say
from lightning_par.host.launch.restart import this_run
from lightning_par.host.namespace import bind, environments

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback as Host
else:
    Host = object  # the class of the caller's Lightning, by `bind`

NAME = "preempted.ckpt"
_GO_ON, _STOP, _REQUEUE = range(3)  # what a rank was told; of several, the greatest counts


class StopCallback(Host):
    """Heeds the signals while a Trainer fits; the last of its callbacks, so that others have saved before. On every rank."""

    root = ""  # the Lightning namespace, set by `bind`

    def __init__(self) -> None:
        super().__init__()
        self._told, self._told_at = _GO_ON, 0.0
        self._steps = 0
        self._requeue: Callable[[], Any] | None = None  # Lightning's handler
        self._group: dist.ProcessGroup | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the place of Lightning's handlers, which are restored when the Trainer is done."""
        self._told, self._steps = _GO_ON, trainer.global_step
        if trainer.world_size > 1 and self._group is None:
            # NCCL's would make the host wait for the device
            is_on_host = dist.get_backend() == "gloo"
            self._group = dist.group.WORLD if is_on_host else dist.new_group(backend="gloo", timeout=trainer.strategy.mesh.timeout)
        if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
            return
        signal.signal(signal.SIGTERM, self._heed_sigterm)
        number = _slurm_signal(trainer, self.root)
        if number is None:
            return
        handler = signal.getsignal(number)
        if callable(handler):
            self._requeue = partial(handler, number, None)
            signal.signal(number, self._heed_requeue)
        elif handler == signal.SIG_DFL:
            signal.signal(number, self._heed_sigterm)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Stop, where a rank was told to, and the optimizers have stepped: gradients that pile up are not saved."""
        if trainer.global_step == self._steps:
            return
        run = this_run()
        if run is not None:
            run.note_step()
        self._steps = trainer.global_step
        self._stop_if_told(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop, where a rank was told to since the last step: Lightning forgets what was noted here."""
        self._stop_if_told(trainer)

    def _stop_if_told(self, trainer: Any) -> None:
        told = self._told
        if self._group is not None:
            numbers = torch.tensor([told])
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
            told = int(numbers)
        if told == _REQUEUE and self._requeue is not None:
            self._requeue()
            raise Stopped
        if told != _GO_ON:
            path = _place_of(trainer)
            trainer.save_checkpoint(path)
            trainer.strategy.checkpoints.wait()
            if trainer.is_global_zero:
                say(f"told to stop after step {trainer.global_step}: saved {path}; to go on from there: ckpt_path={path}")
            raise Stopped

    def _heed_sigterm(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._told == _GO_ON:
            self._told, self._told_at = _STOP, now
        elif now > self._told_at + SAME_SIGNAL_SECONDS:
            raise SystemExit(128 + number)

    def _heed_requeue(self, number: int, frame: Any) -> None:
        self._told, self._told_at = _REQUEUE, time.monotonic()


def stop_politely(trainer: Any, root: str) -> None:
    """Have a Trainer that is about to fit heed the signals.

    Args:
        trainer: the Trainer.
        root: its Lightning namespace.
    """
    if not any(isinstance(callback, StopCallback) for callback in trainer.callbacks):
        trainer.callbacks.append(bind(StopCallback, root, "callbacks.Callback")())


def _slurm_signal(trainer: Any, root: str) -> signal.Signals | None:
    """The signal before SLURM takes the machine away; None outside of SLURM."""
    environment = trainer.strategy.cluster_environment
    return environment.requeue_signal if isinstance(environment, environments(root).SLURMEnvironment) else None


def _place_of(trainer: Any) -> Path:
    """Beside the run's other checkpoints."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    return Path(folder) / NAME
