"""The data of a run: what a checkpoint has of its loaders and generators, for each replica, and the loaders of a resumed run.

A replica's ranks read alike, so one of them speaks for it. Lightning's own entry for loaders is rank 0's; here every replica has
its own, which takes the place of that entry when a checkpoint is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_par.host.data.evaluation_loader import EvaluationLoader, keep_apart
from lightning_par.host.data.loader import ResumableLoader, make_resumable
from lightning_par.host.data.parts import is_stateful
from lightning_par.host.data.progress import Progress, Start
from lightning_par.host.data.reading import Reading
from lightning_par.runtime.generator_state import generator_states, restore_generators


class DataResumption:
    """Keeps the place in the data of one ``trainer.fit``.

    Args:
        trainer: the Trainer.
        num_replicas: how many replicas read the data in parts.
    """

    def __init__(self, trainer: Any, num_replicas: int) -> None:
        self._progress, self._num_replicas = Progress(trainer), num_replicas
        self._loaded: dict[str, Any] | None = None
        self._start: Start | None = None  # once Lightning's counts are loaded
        self._stateful: list[Any] = []

    def state(self, trainer: dict[str, Any]) -> dict[str, Any]:
        """What this replica needs to go on, as plain data.

        Args:
            trainer: what Lightning keeps. Its entry for loaders is taken out of it, and its counts go back to the last step of
                the optimizer.

        Returns:
            The states, with the number of batches ``unfinished`` that are computed again.
        """
        loops = trainer["loops"]["fit_loop"]
        unfinished, validation = self._progress.position.unfinished, self._progress.next_validation
        if self._progress.is_ahead:
            self._progress.rewind(loops)
            validation = []  # it comes after a batch that is computed again
        return {
            "generators": generator_states(),
            "loaders": loops["state_dict"].pop("combined_loader", []),
            "unfinished": unfinished,
            "left_out": sum(isinstance(loader, EvaluationLoader) for loader in validation),
        }

    def load(self, trainer: dict[str, Any], states: Sequence[dict[str, Any]], replica: int) -> None:
        """Put what a replica needs where Lightning and the loaders will look for it.

        Args:
            trainer: what Lightning keeps.
            states: what `state` gave, by replica. Where there are more replicas now, they share them in turn.
            replica: this rank's.
        """
        self._loaded = states[replica % len(states)]
        trainer["loops"]["fit_loop"]["state_dict"]["combined_loader"] = self._loaded["loaders"]

    def wrap(self, loader: Any) -> Any:
        """A training loader that can be resumed: itself, where it is no DataLoader or has a ``state_dict`` of its own."""
        start = self._start_here()
        if isinstance(loader, DataLoader) and not is_stateful(loader):
            leads = not any(isinstance(each, ResumableLoader) for each in self._stateful)
            loader = make_resumable(loader, Reading(loader, self._progress, start, leads, self._num_replicas))
        if is_stateful(loader):
            self._stateful.append(loader)
            states = [] if self._loaded is None or not start.is_fresh else self._loaded["loaders"]
            if isinstance(loader, ResumableLoader) and states:
                loader.load_state_dict(states[(len(self._stateful) - 1) % len(states)])
        return loader

    def wrap_evaluation(self, loader: Any) -> Any:
        """A loader for the validations of training, which leaves its generators alone."""
        return keep_apart(loader, self._start_here()) if isinstance(loader, DataLoader) else loader

    def _start_here(self) -> Start:
        if self._start is None:
            loaded = self._loaded or {"generators": None, "left_out": 0}
            self._start = Start(self._progress, loaded["generators"], loaded["left_out"])
        return self._start

    def begin(self) -> None:
        """Before the first step, when the loaders are there: undo what hooks have drawn since."""
        start = self._start
        if start is None or start.generators is None:
            if self._progress.total and not self._progress.position.begins:
                rank_zero_warn(
                    "the checkpoint was saved inside an epoch and does not say where its loaders were: another program wrote it, "
                    "and the data of the epoch begin again. Resume from one that was saved between epochs, and all are used once"
                )
            return
        if not self._progress.position.begins:
            restore_generators(start.generators)
        elif self._progress.has_ended_epoch:
            restore_generators(start.after)
            self._progress.begin_epoch()
        else:  # saved in its validation: Lightning ends the epoch now, and the iterators of the next are made after that
            restore_generators(start.generators)
