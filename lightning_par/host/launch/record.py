"""What a run that may be restarted has done, in a folder that outlives its ranks.

    who starts the ranks again    where the folder is                                   who removes it
    our supervisor                it makes one, and says so in the ranks' environment   the supervisor, when the run is over
    torchrun                      in the folder for temporary files, named after        the first start of a run of the same name
                                  torchrun's process

The first rank of a machine writes; every rank reads. A save is noted before it begins, so that all machines know of each one
that was published, whenever a rank was killed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

RUN = "LIGHTNING_PAR_RUN"  # in the environment of the ranks: what `Attempt.words` says


@dataclass(frozen=True)
class Attempt:
    """One start of a run's ranks.

    Attributes:
        folder: of the record.
        restart: how many starts were before it.
        max_restarts: how many there may be at the most.
        after: what ended the one before, in words; empty where nobody knows.
    """

    folder: str
    restart: int
    max_restarts: int
    after: str = ""

    def words(self) -> dict[str, str]:
        """What is added to the environment of a rank."""
        return {RUN: json.dumps(asdict(self))}


class Record:
    """The record, written and read.

    Args:
        folder: where it is.
    """

    def __init__(self, folder: Path) -> None:
        self._steps, self._saves = folder / "stepped", folder / "saves"

    @property
    def has_stepped(self) -> bool:
        """Whether an optimizer has ever stepped: what fails later is no mistake in the configuration."""
        return self._steps.exists()

    def note_step(self) -> None:
        """An optimizer has stepped."""
        self._steps.touch()

    def note_save(self, fit: int, path: Path) -> None:
        """A checkpoint is about to be saved.

        Args:
            fit: which call of ``trainer.fit`` saves it, counted from 0.
            path: where.
        """
        with self._saves.open("a") as file:
            file.write(json.dumps([fit, str(path.absolute())]) + "\n")

    def saves_of(self, fit: int) -> list[Path]:
        """Where a call of ``trainer.fit`` has saved, the last one first, each once."""
        if not self._saves.exists():
            return []
        noted = [json.loads(line) for line in self._saves.read_text().splitlines()]
        return list(dict.fromkeys(Path(path) for number, path in reversed(noted) if number == fit))


@lru_cache
def this_attempt() -> Attempt | None:
    """The attempt that this process is a rank of; None where nobody starts its ranks again. The same at every call."""
    words = os.environ.pop(RUN, None)  # popped: a program that this rank starts is not one of the ranks
    if words is not None:
        return Attempt(**json.loads(words))
    max_restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if not max_restarts:
        return None
    name = f"lightning_par-{os.getuid()}-{os.environ['TORCHELASTIC_RUN_ID']}-{os.getppid()}"
    folder = Path(tempfile.gettempdir()) / name.replace(os.sep, "_")
    attempt = Attempt(str(folder), int(os.environ["TORCHELASTIC_RESTART_COUNT"]), max_restarts)
    if os.environ["LOCAL_RANK"] == "0":
        if attempt.restart == 0:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, exist_ok=attempt.restart > 0)  # not one that somebody else has put there
    return attempt
