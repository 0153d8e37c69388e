"""The log of one rank: a file of its own, and its name on every line that it logs anywhere.

    where                                   what is in it
    the console, the log file of the job    what the loggers of all ranks say, warnings too, each line with rank and coordinate;
                                            in the file the first rank's
    RUN/ranks/rank_03_pp1_dp0_tp1.log       the same of one rank; of the others than the first all that Python prints, too; what a
                                            rank raised

Nothing here knows Lightning or torch.
"""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

from lightning_par.layout import Layout

FOLDER = "ranks"  # in the folder of the run
_FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"  # Hydra's


class RankLog(logging.Handler):
    """A handler of the root logger, which is there while a job runs: a context. What comes before `open` waits in memory.

    Args:
        is_first: whether this is the first rank, whose prints stay on the console, and which alone writes the job's log file.
        words: the rank's name; empty as long as there may be one rank only.

    Attributes:
        words: see there.
    """

    def __init__(self, is_first: bool, words: str) -> None:
        super().__init__()
        self.words, self._is_first = words, is_first
        self._early = io.StringIO()
        self._file: TextIO = self._early
        self._path: Path | None = None
        self._labelled: list[tuple[logging.Handler, logging.Formatter | None]] = []

    @classmethod
    def current(cls) -> RankLog | None:
        """The log of this rank; None outside of a job."""
        return next((handler for handler in logging.getLogger().handlers if isinstance(handler, cls)), None)

    def __enter__(self) -> RankLog:
        root = logging.getLogger()
        if not self._is_first:
            for file in [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]:
                root.removeHandler(file)
                file.close()
            self._consoles = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = (cast(TextIO, _Copied(console, self)) for console in self._consoles)
            logging.captureWarnings(True)
        self.setFormatter(logging.Formatter(_FORMAT))
        root.addHandler(self)
        for handler in root.handlers:
            self._labelled.append((handler, handler.formatter))
            handler.setFormatter(_Labelled(handler.formatter or logging.Formatter(), self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self.handle(logging.LogRecord("lightning_par", logging.ERROR, __file__, 0, "raised", (), (type(error), error, trace)))
        logging.captureWarnings(False)
        for handler, formatter in self._labelled:
            handler.setFormatter(formatter)
        logging.getLogger().removeHandler(self)
        if not self._is_first:
            sys.stdout, sys.stderr = self._consoles
        self._file.close()
        self.close()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, as `logging.Handler` asks for it."""
        try:
            self.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)

    def write(self, text: str) -> None:
        """Write what is no record; nothing once the job is over, as somebody may have kept a console of it."""
        if not self._file.closed:
            self._file.write(text)

    def leave(self) -> None:
        """There is one rank only: its log is that of the job."""
        logging.getLogger().removeHandler(self)

    def open(self, folder: Path, layout: Layout, rank: int) -> Path:
        """Write to a file from now on, what has come before first. The same file again where it is called again.

        Args:
            folder: of the run; made if need be, also on a machine that does not share it with the first rank.
            layout: dp resolved.
            rank: this one.
        """
        if self._path is None:
            self.words = f"rank {rank} ({layout.coordinate_of(rank)})"
            at = layout.coordinate_of(rank)
            number = str(rank).zfill(max(2, len(str(layout.world_size - 1))))
            self._path = folder / FOLDER / f"rank_{number}_pp{at.pp}_dp{at.dp}_tp{at.tp}.log"
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", buffering=1, errors="backslashreplace")
            self._file.write(self._early.getvalue())
            logging.captureWarnings(True)  # of the first rank not before: what it prints may be read by a program
        return self._path


class _Labelled(logging.Formatter):
    """What another formatter makes of a record, with the rank's name before each line."""

    def __init__(self, formatter: logging.Formatter, log: RankLog) -> None:
        super().__init__()
        self._formatter, self._log = formatter, log

    def format(self, record: logging.LogRecord) -> str:
        text, words = self._formatter.format(record), self._log.words
        return "\n".join(f"[{words}] {line}" for line in text.splitlines()) if words else text


class _Copied:
    """A console of which the rank's log gets a copy; only what Python writes, as code in C writes to the descriptor."""

    def __init__(self, console: TextIO, log: RankLog) -> None:
        self._console, self._log = console, log

    def write(self, text: str) -> int:
        self._log.write(text)
        return self._console.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)
