"""The process that the user started, where a run may be restarted: it starts all ranks, and starts them again if one fails.

what ends the ranks                                        what follows
all finish                                                 exit code 0
one is killed or does not answer                           they are started again
one raises, after an optimizer has stepped in this run     they are started again
one raises before that, or `NumericsError`                 its exit code: it would fail again
one ends with exit code 2                                  the same
SIGTERM, to this process                                   the ranks hear of it: 0 if they stop politely (`host/stop.py`)
a second one, a moment later                               all end at once
Ctrl-C                                                     all end
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_par.errors import NumericsError
from lightning_par.host.launch.ending import MISCONFIGURED, SAME_SIGNAL_SECONDS, say
from lightning_par.host.launch.processes import FINISH_SECONDS, GRACE_SECONDS, POLL_SECONDS, StartedRanks
from lightning_par.host.launch.record import Attempt, Record

Commands = Sequence[tuple[list[str], str | None]]


class RunSupervisor:
    """Starts all ranks of this machine, at most ``1 + max_restarts`` times. In the main thread.

    Args:
        commands: of each rank, and the folder to start it in, as `StartedRanks.start` takes them.
        environments: what is added to the environment of each.
        describe: a rank's name for messages, by its index.
        max_restarts: how often they are started again.
    """

    def __init__(
        self,
        commands: Commands,
        environments: Sequence[Mapping[str, str]],
        describe: Callable[[int], str],
        max_restarts: int,
    ) -> None:
        self._commands, self._environments, self._describe, self._max_restarts = commands, environments, describe, max_restarts
        self._ranks = StartedRanks(describe)
        self._told_at: float | None = None  # when SIGTERM came first
        self._must_end = False

    def run(self) -> int:
        """Let the run come to its end; the exit code for it."""
        folder = Path(tempfile.mkdtemp(prefix="lightning_par-run-"))
        earlier = signal.signal(signal.SIGTERM, self._heed)
        try:
            return self._attempts(folder)
        except KeyboardInterrupt:
            return self._interrupt()
        finally:
            signal.signal(signal.SIGTERM, earlier)
            shutil.rmtree(folder, ignore_errors=True)

    def _attempts(self, folder: Path) -> int:
        after = ""
        for restart in range(1 + self._max_restarts):
            attempt = Attempt(str(folder), restart, self._max_restarts, after)
            self._ranks = StartedRanks(self._describe)
            self._ranks.start(self._commands, [{**each, **attempt.words()} for each in self._environments])
            failure = self._wait()
            code = self._exit_code(failure)
            if code == 0 or not _may_go_on(failure, code, Record(folder)):
                break
            if self._told_at is not None:
                return 128 + signal.SIGTERM
            after = "" if failure is None else f"{self._describe(failure[0])} {failure[1]}"
        return code if code >= 0 else 1

    def _wait(self) -> tuple[int, str] | None:
        """Wait for the end of all ranks, which one that fails brings about. Returns index and words of that one."""
        processes, done_at = self._ranks.processes, None
        while self._ranks.are_running() and not self._must_end and self._ranks.look() is None:
            if done_at is None and any(process.returncode == 0 for process in processes):
                done_at = time.monotonic()
            if done_at is not None and time.monotonic() > done_at + FINISH_SECONDS:
                late = [self._describe(index) for index, process in enumerate(processes) if process.returncode is None]
                say(f"{', '.join(late)} did not finish within {FINISH_SECONDS:.0f} s of the others: ending")
                break
            time.sleep(POLL_SECONDS)
        return self._ranks.end_all()

    def _exit_code(self, failure: tuple[int, str] | None) -> int:
        """Of the rank that failed first; below 0 where it was killed."""
        codes = [process.returncode for process in self._ranks.processes]
        return codes[failure[0]] if failure is not None else next((code for code in codes if code), 0)

    def _heed(self, number: int, frame: Any) -> None:
        """Pass SIGTERM on; a second one, which is not another copy of the first, ends the ranks."""
        if self._told_at is not None:
            self._must_end = time.monotonic() > self._told_at + SAME_SIGNAL_SECONDS
            return
        self._told_at = time.monotonic()
        for process in self._ranks.processes:
            process.terminate()

    def _interrupt(self) -> int:
        """After Ctrl-C, which a terminal sends to the ranks too, but ``kill -INT`` does not."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for process in self._ranks.processes:
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + GRACE_SECONDS
        while self._ranks.are_running() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for process in self._ranks.processes:
            process.kill()
            process.wait()
        return 1


def _may_go_on(failure: tuple[int, str] | None, code: int, record: Record) -> bool:
    words = "" if failure is None else failure[1]
    may_go_well = not words.startswith(("raised", "ended")) or record.has_stepped
    return code != MISCONFIGURED and may_go_well and not words.startswith(f"raised {NumericsError.__name__}")
