"""The ranks of one machine as one thing: if one ends badly, all end.

The first rank starts the others (`RankProcesses.start`) and watches them. Whatever happens, no process is left behind and
no rank waits for a dead one:

    a rank dies          one line names it; the others are ended; the first rank has GRACE_SECONDS to fail by itself
    the first rank raises    `abort`: the others are ended at once
    the first rank is gone   each other rank sees it within a second and ends (`exit_with_parent`)
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

POLL_SECONDS = 0.05
TERMINATE_SECONDS = 3.0  # from SIGTERM to SIGKILL: enough to flush logs; a rank stuck in a collective needs the SIGKILL
GRACE_SECONDS = 10.0  # for the first rank, whose collective fails with its peer, to raise and end in its own way
FINISH_SECONDS = 60.0  # for the others to finish after the first rank has
PARENT = "LIGHTNING_PAR_PARENT"  # process id of the first rank, in the environment of the others


class RankProcesses:
    """Processes of the ranks that this process started."""

    def __init__(self, describe: Callable[[int], str]) -> None:
        """Args:
        describe: a rank's name for messages, from its index in `start` (counted from 0).
        """
        self.processes: list[subprocess.Popen[bytes]] = []
        self._describe = describe
        self._ending = threading.Event()  # this process has taken over; the watcher is to leave it alone
        self._lock = threading.Lock()
        self._reported = False

    def start(self, commands: Sequence[tuple[list[str], str | None]], environments: Sequence[Mapping[str, str]]) -> None:
        """Start one process per (command, folder), and watch them until they end."""
        for (command, folder), environment in zip(commands, environments, strict=True):
            child_environment = {**os.environ, **environment, PARENT: str(os.getpid())}
            self.processes.append(subprocess.Popen(command, env=child_environment, cwd=folder))
        threading.Thread(target=self._watch, daemon=True, name="rank-watcher").start()
        atexit.register(self.finish)

    def abort(self, wait_seconds: float = 1.0) -> None:
        """End the others now, because this process failed.

        Args:
            wait_seconds: how long to look for a rank that failed first: its death is then why this process failed.
        """
        deadline = time.monotonic() + wait_seconds
        while not self._failed() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self._ending.set()
        self._report()
        self._end()

    def finish(self, timeout_seconds: float = FINISH_SECONDS) -> None:
        """Wait until the others have finished; end those that have not within ``timeout_seconds``."""
        atexit.unregister(self.finish)
        deadline = time.monotonic() + timeout_seconds
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > deadline:
                late = [self._describe(index) for index, process in enumerate(self.processes) if process.returncode is None]
                _say(f"{', '.join(late)} did not finish within {timeout_seconds:.0f} s of the first rank: ending them")
                break
            time.sleep(POLL_SECONDS)
        self._ending.set()
        self._end()

    def _watch(self) -> None:
        while not self._ending.is_set():
            if self._failed():
                self._report()
                self._end()
                if not self._ending.wait(GRACE_SECONDS):
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(1)  # the main thread may be inside a collective that no signal interrupts
                return
            if all(process.returncode == 0 for process in self.processes):
                return
            time.sleep(POLL_SECONDS)

    def _failed(self) -> list[int]:
        return [index for index, process in enumerate(self.processes) if process.poll()]

    def _report(self) -> None:
        """Say which ranks ended badly on their own, once."""
        with self._lock:
            failed, self._reported = [] if self._reported else self._failed(), True
        if failed:
            ends = "; ".join(f"{self._describe(index)} {_how_it_ended(self.processes[index])}" for index in failed)
            _say(f"{ends}: ending all ranks")

    def _end(self) -> None:
        for process in self.processes:
            process.terminate()
        deadline = time.monotonic() + TERMINATE_SECONDS
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def exit_with_parent() -> None:
    """In a rank that `RankProcesses` started: end this process soon after the one that started it is gone."""
    parent = os.environ.pop(PARENT, None)  # popped: a program that this rank starts is not one of the ranks
    if parent is not None:
        threading.Thread(target=_exit_when_orphaned, args=(int(parent),), daemon=True, name="parent-watcher").start()


def _exit_when_orphaned(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _say(message: str) -> None:
    print(f"lightning_par: {message}", file=sys.stderr, flush=True)
