"""Where training is in its data, by Lightning's counts; read in Lightning 2.6 (loops/progress.py, loops/training_epoch_loop.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_par.private.lightning import loaders_of_next_validation
from lightning_par.runtime.generator import generators_put_back
from lightning_par.runtime.generator_state import draw_seed, generator_states, restore_generators


@dataclass(frozen=True)
class Position:
    """A place between two batches.

    Attributes:
        epoch: which one, from 0.
        batches: those of it that training has used. Batches of an accumulation that has not stepped yet are not used: what they
            left in the gradients is not in a checkpoint, so they are read again.
        unfinished: how many those are.
        begins: whether the epoch has not begun; then its order is yet to be drawn.
    """

    epoch: int
    batches: int
    unfinished: int
    begins: bool


class Progress:
    """The counts of a Trainer.

    Lightning counts a batch as ``ready`` when it is fetched and as ``processed`` when its step is done. Checkpoints are saved in
    ``on_train_batch_end``, when it is not ``completed`` yet, in a validation, in a hook of an epoch, or when a step has failed.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    @property
    def total(self) -> int:
        """Batches that were used in all epochs."""
        return int(self._batches.total.processed)

    @property
    def position(self) -> Position:
        """Where training is."""
        epochs, batches = self._trainer.fit_loop.epoch_progress.current, self._batches.current
        if epochs.processed == epochs.ready:
            return Position(epochs.ready, 0, 0, begins=True)
        if epochs.started < epochs.ready:  # in a hook before the epoch
            return Position(epochs.ready - 1, 0, 0, begins=True)
        if self._batches.is_last_batch and batches.processed == batches.ready:
            return Position(epochs.ready, 0, 0, begins=True)
        unfinished = batches.processed % self._trainer.accumulate_grad_batches
        return Position(epochs.ready - 1, batches.processed - unfinished, unfinished, begins=False)

    def is_reloaded_after(self, epoch: int) -> bool:
        """Whether the Trainer asks for loaders anew now, if it last did before ``epoch``."""
        position, every = self.position, self._trainer.reload_dataloaders_every_n_epochs
        return bool(every) and position.begins and position.epoch - epoch >= every

    @property
    def has_ended_epoch(self) -> bool:
        """Whether there is no epoch that has begun and not ended; after its last batch there is, until its hooks have run."""
        epochs = self._trainer.fit_loop.epoch_progress.current
        return bool(epochs.processed == epochs.ready)

    @property
    def next_validation(self) -> list[Any]:
        """The loaders of the validation that follows now. A run that is resumed here leaves it out."""
        total = self._batches.total
        return loaders_of_next_validation(self._trainer) if total.completed < total.processed == total.ready else []

    def begin_epoch(self) -> None:
        """Have a run that was saved after the last batch of an epoch begin the next, as one that was not stopped does.

        Lightning 2.6 leaves out ``on_train_epoch_start`` and does not count the epoch where it was saved in a hook after the
        batch; with ``max_steps`` it goes on after the last batch where it was saved in a hook after the epoch; saved in a hook
        before the epoch, it counts it twice; and it counts batches from 0 only where their number is known.
        """
        loop, batches = self._trainer.fit_loop, self._batches
        loop.reset_restart_stage()
        if batches.total.completed == batches.total.processed:
            for epochs in (loop.epoch_progress.total, loop.epoch_progress.current):
                epochs.ready = epochs.started = epochs.completed = epochs.processed
            loop.epoch_loop.restarting = False
        elif self._trainer.num_training_batches == float("inf"):
            self.move(-batches.current.processed)

    def move(self, batches: int) -> None:
        """Have Lightning count so many batches of this epoch more, or fewer, as used."""
        current = self._batches.current
        for name in ("ready", "started", "processed", "completed"):
            setattr(current, name, getattr(current, name) + batches)

    @property
    def is_ahead(self) -> bool:
        """Whether a batch has begun that counts as not used."""
        position = self.position
        return not position.begins and bool(self._batches.current.ready > position.batches)

    def rewind(self, loops: dict[str, Any]) -> None:
        """Have counts that are being saved go back to the last step of the optimizer, as if they were saved after it.

        Args:
            loops: the state of the loops of ``fit``.
        """
        position, saved = self.position, loops["epoch_loop.batch_progress"]
        for name in ("total", "current"):
            used = saved[name]["processed"] - position.unfinished
            saved[name].update(ready=used, started=used, processed=used, completed=used - bool(position.batches))
        if position.batches or self._trainer.enable_validation:  # Lightning counts the step before where it goes on
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1

    @property
    def _batches(self) -> Any:
        return self._trainer.fit_loop.epoch_loop.batch_progress


class Start:
    """Where a run is resumed. Until it has used a batch, all that is made for its loaders is made from here.

    Args:
        progress: as it was loaded.
        generators: the global ones of this replica when the checkpoint was saved; None where there is no checkpoint.
        num_left_out: loaders of the validation that was to come; Lightning leaves it out when it resumes. What it would have drawn
            is drawn here.

    Attributes:
        generators: the global ones of this replica, for what is made next.
        after: those with which training begins, its loaders being made.
    """

    def __init__(self, progress: Progress, generators: Any, num_left_out: int = 0) -> None:
        self._progress, self._total, self._leaves_out = progress, progress.total, num_left_out > 0
        self.generators: Any = None
        if generators is not None:
            restore_generators(generators)
            for _ in range(num_left_out):
                draw_seed()
            self.generators = generator_states()
        self.after = self.generators

    @property
    def is_fresh(self) -> bool:
        """Whether the run has used no batch yet."""
        return self._progress.total == self._total

    def draw_for_evaluation(self) -> int:
        """A seed for a loader of a validation; it was drawn already for one that is left out, whose loader Lightning asks still."""
        if self._leaves_out and self.is_fresh:
            with generators_put_back():
                return draw_seed()
        return draw_seed()
