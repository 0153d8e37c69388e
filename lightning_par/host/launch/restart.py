"""What a run goes on from when its ranks were started again: the newest good checkpoint that it has saved."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_par.errors import CheckpointError
from lightning_par.host.launch.ending import say
from lightning_par.host.launch.record import Attempt, Record, this_attempt


class Run:
    """The run that this rank is a part of, seen from inside; see `this_run`.

    Args:
        attempt: which start of its ranks this is.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._attempt, self._record = attempt, Record(Path(attempt.folder))
        self._writes = os.environ.get("LOCAL_RANK", "0") == "0"
        self._has_stepped = False
        self._fit = -1  # which call of trainer.fit is running

    def begin_fit(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], speaks: bool) -> Any:
        """Put the newest good checkpoint of an earlier start in the place of the user's ``ckpt_path``, where there is one.

        Args:
            function: what the Trainer runs.
            args, kwargs: its arguments.
            speaks: whether this rank says what it goes on from.

        Returns:
            ``args`` and ``kwargs`` to use.
        """
        self._fit += 1
        attempt = self._attempt
        if attempt.restart == 0:
            return args, kwargs
        path = _newest(self._record.saves_of(self._fit), say if speaks else _keep_quiet)
        if speaks:
            after = f" after {attempt.after}" if attempt.after else ""
            way = "starting as at first, as no checkpoint was saved" if path is None else f"going on from {path}"
            say(f"restart {attempt.restart} of {attempt.max_restarts}{after}: {way}")
        if path is None:
            return args, kwargs
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.arguments["ckpt_path"] = str(path)
        return bound.args, bound.kwargs

    def note_step(self) -> None:
        """An optimizer has stepped."""
        if self._writes and not self._has_stepped:
            self._record.note_step()
            self._has_stepped = True

    def note_save(self, path: Path) -> None:
        """A checkpoint that training can go on from is about to be saved."""
        if self._writes:
            self._record.note_save(self._fit, path)


@lru_cache
def this_run() -> Run | None:
    """The run that this process is a rank of; None where nobody starts its ranks again. The same at every call."""
    attempt = this_attempt()
    return None if attempt is None else Run(attempt)


def _newest(paths: Sequence[Path], tell: Callable[[str], None]) -> Path | None:
    """The checkpoint of the greatest step that can be opened; of several, the first.

    Not the last save that was begun: a rank that was killed in it left the checkpoint of that name as it was before.
    """
    from lightning_par.checkpoint import Checkpoint  # late: the launcher needs no torch

    steps: dict[Path, int] = {}
    for path in paths:
        try:
            steps[path] = Checkpoint(path).trainer()["trainer"]["global_step"]
        except CheckpointError as error:
            if path.exists():  # else it was pruned, or never published
                tell(f"{path} is left out: {error}")
    return max(steps, key=steps.__getitem__, default=None)


def _keep_quiet(message: str) -> None:
    """Another rank says it."""
