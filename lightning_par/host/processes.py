"""The ranks of one machine as one thing: if one fails, all end.

The first rank starts the others (`RankProcesses.start`) and watches them. Whatever happens, no process is left behind and
no rank waits for a dead one:

    another rank raises      it says so through a pipe (`report_failure`), so that the rank that failed first is known,
                             whatever its failure makes the others raise; it gets REPORT_SECONDS to print its traceback
    another rank dies        seen by its exit code
       in both cases         one line names it; the others are ended; the first rank has GRACE_SECONDS to fail by itself
    the first rank raises    `abort`: the others are ended at once
    the first rank is gone   each other rank sees it within a second and ends (`join_parent`)
    the first rank is done   it waits for the others before it exits

Nothing here knows Lightning or torch.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

POLL_SECONDS = 0.05
REPORT_SECONDS = 5.0  # from a rank's report of its failure to its end
TERMINATE_SECONDS = 3.0  # from SIGTERM to SIGKILL: enough to flush logs; a rank stuck in a collective needs the SIGKILL
GRACE_SECONDS = 10.0  # for the first rank, whose collective fails with its peer, to raise and end in its own way
FINISH_SECONDS = 60.0  # for the others to finish after the first rank has
PARENT = "LIGHTNING_PAR_PARENT"  # in the environment of the others: the first rank's process id and the pipe's descriptor


class RankProcesses:
    """Processes of the ranks that this process started."""

    def __init__(self, describe: Callable[[int], str]) -> None:
        """Args:
        describe: a rank's name for messages, from its index in `start` (counted from 0).
        """
        self.processes: list[subprocess.Popen[bytes]] = []
        self._describe = describe
        self._ending = threading.Event()  # the main thread has taken over; the watcher is to leave it alone
        self._lock = threading.Lock()
        self._cause: tuple[int, str] | None = None  # index and words of the rank that failed first
        self._is_settled = False  # from now on ranks end because they are ended

    def start(self, commands: Sequence[tuple[list[str], str | None]], environments: Sequence[Mapping[str, str]]) -> None:
        """Start one process per (command, folder), and watch them until they end."""
        self._reports, reporting_end = os.pipe()
        os.set_blocking(self._reports, False)
        for index, ((command, folder), environment) in enumerate(zip(commands, environments, strict=True)):
            child_environment = {**os.environ, **environment, PARENT: f"{os.getpid()} {reporting_end} {index}"}
            self.processes.append(subprocess.Popen(command, env=child_environment, cwd=folder, pass_fds=(reporting_end,)))
        os.close(reporting_end)
        threading.Thread(target=self._watch, daemon=True, name="rank-watcher").start()
        atexit.register(self._finish_at_exit)

    def abort(self) -> None:
        """End the others, because this process failed: at once, unless one of them failed first and is about to say why."""
        self._ending.set()
        self._end_all()

    def finish(self, timeout_seconds: float = FINISH_SECONDS) -> None:
        """Wait until the others have finished; end those that have not within ``timeout_seconds``."""
        atexit.unregister(self._finish_at_exit)
        deadline = time.monotonic() + timeout_seconds
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > deadline:
                late = [self._describe(index) for index, process in enumerate(self.processes) if process.returncode is None]
                _say(f"{', '.join(late)} did not finish within {timeout_seconds:.0f} s of the first rank: ending")
                break
            time.sleep(POLL_SECONDS)
        self._ending.set()
        self._end_all()

    def _finish_at_exit(self) -> None:
        if not self._ending.is_set():
            self.finish()
            if self._cause is not None:
                _exit_now()  # the first rank did its part, but the run has failed

    def _watch(self) -> None:
        while not self._ending.is_set():
            if self._find_cause():
                self._end_all()
                if not self._ending.wait(GRACE_SECONDS):
                    _exit_now()  # the main thread may be inside a collective that no signal interrupts
                return
            if all(process.returncode == 0 for process in self.processes):
                return
            time.sleep(POLL_SECONDS)

    def _end_all(self) -> None:
        cause = self._settle_cause()
        if cause is not None:
            deadline = time.monotonic() + REPORT_SECONDS
            while self.processes[cause[0]].poll() is None and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        for process in self.processes:
            process.terminate()
        deadline = time.monotonic() + TERMINATE_SECONDS
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _settle_cause(self) -> tuple[int, str] | None:
        """What made the run fail, for good; said once. ``None`` where it was the first rank, or nothing."""
        cause = self._find_cause()
        with self._lock:
            is_news, self._is_settled = not self._is_settled, True
        if cause is not None and is_news:
            _say(f"{self._describe(cause[0])} {cause[1]}: ending all ranks")
        return cause

    def _find_cause(self) -> tuple[int, str] | None:
        """The rank that failed first: the first report in the pipe, or else a rank that ended badly without one."""
        with self._lock:
            if self._cause is None and not self._is_settled:
                ended = [(index, _how_it_ended(process)) for index, process in enumerate(self.processes) if process.poll()]
                self._cause = self._read_report() or next(iter(ended), None)
            return self._cause

    def _read_report(self) -> tuple[int, str] | None:
        try:
            index, _, words = os.read(self._reports, 1 << 16).decode(errors="replace").partition("\n")[0].partition(" ")
        except BlockingIOError:  # no report so far
            return None
        return (int(index), words) if index else None  # empty once all ranks have closed their end


@lru_cache
def join_parent() -> tuple[int, str] | None:
    """In a rank that `RankProcesses` started: end this process soon after the one that started it is gone.

    Returns:
        The pipe's descriptor and this rank's index, or ``None`` in any other process. The same at every call.
    """
    link = os.environ.pop(PARENT, None)  # popped: a program that this rank starts is not one of the ranks
    if link is None:
        return None
    parent, descriptor, index = link.split()
    threading.Thread(target=_exit_when_orphaned, args=(int(parent),), daemon=True, name="parent-watcher").start()
    return int(descriptor), index


def report_failure(error: BaseException) -> None:
    """In a rank that `RankProcesses` started: tell the first rank why this one is about to end.

    Not for Ctrl-C, which the terminal sends to every rank.
    """
    link = join_parent()
    if link is not None and not isinstance(error, KeyboardInterrupt):
        words = " ".join(f"{type(error).__name__}: {error}".split())[:1000]  # one line, short enough to be written whole
        try:
            os.write(link[0], f"{link[1]} raised {words}\n".encode())
        except OSError:  # the first rank is gone
            return


def _exit_when_orphaned(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _exit_now() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _say(message: str) -> None:
    print(f"lightning_par: {message}", file=sys.stderr, flush=True)
