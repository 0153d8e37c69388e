"""The ranks of one machine as one thing: if one fails, all end.

The first rank starts the others (`RankProcesses.start`) and watches them; in a run that may be restarted a supervisor starts all
(`host/launch/supervisor.py`), and stands in the first rank's place below. Whatever happens, no process is left behind and no
rank waits for a dead one:

    another rank raises      it says so through a pipe (`report_failure`), so that the rank that failed first is known,
                             whatever its failure makes the others raise; it gets REPORT_SECONDS to print its traceback
    another rank dies        seen by its exit code
    another rank hangs       its watchdog reports it as if it had raised (`end`)
    it does not answer       stopped, or hung in C: in a step its heartbeat is missed; a signal makes it show its stacks
       in all these cases    one line names it; the others are ended; the first rank has GRACE_SECONDS to fail by itself
    the first rank raises    `abort`: the others are ended at once
    the first rank hangs     its watchdog says so and ends all
    it does not answer       the second rank ends it
    the first rank is gone   each other rank sees it within a second and ends (`host/launch/link.py`)
    the first rank is done   it waits for the others before it exits

Nothing here knows Lightning or torch.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from lightning_par.host.launch.ending import abort_process, exit_now, say, show_stacks_when_aborted
from lightning_par.host.launch.link import link_words
from lightning_par.host.launch.pulse import Pulse, share_memory

POLL_SECONDS = 0.05
SETTLE_SECONDS = 0.3  # a rank that was killed may be known to be dead only after others have raised, whose connections it closed
REPORT_SECONDS = 5.0  # from a rank's report of its failure to its end
TERMINATE_SECONDS = 3.0  # from SIGTERM to SIGKILL: enough to flush logs; a rank stuck in a collective needs the SIGKILL
GRACE_SECONDS = 5.0  # for the first rank, whose collective fails with its peer, to raise and end in its own way
FINISH_SECONDS = 60.0  # for the others to finish after the first rank has


class StartedRanks:
    """Processes of the ranks that this process started.

    Args:
        describe: a rank's name for messages, from its index in `start` (counted from 0; -1 for the rank that starts the others).

    Attributes:
        processes: of the ranks, by index.
    """

    def __init__(self, describe: Callable[[int], str]) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self._describe = describe
        self._one_ends_all = threading.Lock()  # watcher, watchdog and main thread may want to at once: the others wait for it
        self._lock = threading.Lock()
        self._cause: tuple[int, str] | None = None  # index and words of the rank that failed first
        self._silent: int | None = None  # index of that rank, where it does not answer
        self._is_settled = False  # from now on ranks end because they are ended

    def start(self, commands: Sequence[tuple[list[str], str | None]], environments: Sequence[Mapping[str, str]]) -> None:
        """Start one process per (command, folder)."""
        self._reports, reporting_end = os.pipe()
        os.set_blocking(self._reports, False)
        memory = share_memory(1 + len(commands))
        for index, ((command, folder), environment) in enumerate(zip(commands, environments, strict=True)):
            link = link_words(os.getpid(), reporting_end, memory, index)
            descriptors = (reporting_end, memory)
            self.processes.append(
                subprocess.Popen(command, env={**os.environ, **environment, **link}, cwd=folder, pass_fds=descriptors)
            )
        os.close(reporting_end)
        self._pulse = Pulse(memory, 0)

    def look(self) -> tuple[int, str] | None:
        """Index and words of a rank that has failed; called every POLL_SECONDS, which the ranks hear as a heartbeat."""
        self._pulse.beat()
        cause = self._find_cause()
        return cause if cause is not None else self._find_silent()

    def end_all(self) -> tuple[int, str] | None:
        """End the ranks that are running.

        Returns:
            Index and words of the rank whose failure was the first; said once. None where none has failed.
        """
        with self._one_ends_all:
            cause = self._settle_cause()
            if cause is not None:
                self._let_report(cause[0])
            for process in self.processes:
                process.terminate()
            deadline = time.monotonic() + TERMINATE_SECONDS
            for process in self.processes:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            return cause

    def are_running(self) -> bool:
        """Whether one of them is."""
        return any(process.poll() is None for process in self.processes)

    def _let_report(self, index: int) -> None:
        """Wait for the end of the rank that failed, which says why; one that does not answer is made to."""
        process = self.processes[index]
        if index == self._silent and process.poll() is None:
            abort_process(process.pid)
        deadline = time.monotonic() + REPORT_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _settle_cause(self) -> tuple[int, str] | None:
        """What made the run fail, for good; said once. ``None`` where it was the first rank, or nothing."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while not self._is_settled and not self._killed() and self.are_running() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        cause = self._find_cause()
        with self._lock:
            is_news, self._is_settled = not self._is_settled, True
        if cause is not None and is_news:
            say(f"{self._describe(cause[0])} {cause[1]}: ending all ranks")
        return cause

    def _find_cause(self) -> tuple[int, str] | None:
        """The rank that failed first: one that was killed, the first report in the pipe, or else one that ended badly without."""
        with self._lock:
            if not self._is_settled:
                ended = [(index, _how_it_ended(process)) for index, process in enumerate(self.processes) if process.poll()]
                self._cause = self._killed() or self._cause or self._read_report() or next(iter(ended), None)
            return self._cause

    def _killed(self) -> tuple[int, str] | None:
        killed = [index for index, process in enumerate(self.processes) if (process.poll() or 0) < 0]
        return (killed[0], _how_it_ended(self.processes[killed[0]])) if killed else None

    def _find_silent(self) -> tuple[int, str] | None:
        """A rank that does not answer, of those that must."""
        silent = [self._pulse.silent_seconds(1 + index, POLL_SECONDS) for index in range(len(self.processes))]
        if not any(silent):
            return None
        with self._lock:
            if self._cause is None and not self._is_settled:
                self._silent = silent.index(max(silent))
                self._cause = self._silent, f"has not answered for {max(silent):.0f} s"
            return self._cause

    def _read_report(self) -> tuple[int, str] | None:
        try:
            index, _, words = os.read(self._reports, 1 << 16).decode(errors="replace").partition("\n")[0].partition(" ")
        except BlockingIOError:  # no report so far
            return None
        return (int(index), words) if index else None  # empty once all ranks have closed their end


class RankProcesses(StartedRanks):
    """The other ranks, started by the first; the supervisor of this one."""

    counts_heartbeats = True

    def __init__(self, describe: Callable[[int], str]) -> None:
        super().__init__(describe)
        self._ending = threading.Event()  # the main thread has taken over; the watcher is to leave it alone

    def start(self, commands: Sequence[tuple[list[str], str | None]], environments: Sequence[Mapping[str, str]]) -> None:
        """Start one process per (command, folder), and watch them until they end."""
        super().start(commands, environments)
        show_stacks_when_aborted()
        threading.Thread(target=self._watch, daemon=True, name="rank-watcher").start()
        atexit.register(self._finish_at_exit)

    def expect(self, seconds: float) -> None:
        """See `runtime.watchdog.Supervisor`; for the first rank."""
        self._pulse.expect(seconds)

    def end(self, words: str) -> None:
        """See `runtime.watchdog.Supervisor`; for the first rank."""
        say(f"{self._describe(-1)} {words}: ending all ranks")
        self.abort()
        exit_now()

    def abort(self) -> None:
        """End the others, because this process failed: at once, unless one of them failed first and is about to say why."""
        self._ending.set()
        self.end_all()

    def finish(self, timeout_seconds: float = FINISH_SECONDS) -> None:
        """Wait until the others have finished; end those that have not within ``timeout_seconds``."""
        atexit.unregister(self._finish_at_exit)
        deadline = time.monotonic() + timeout_seconds
        while self.are_running():
            if time.monotonic() > deadline:
                late = [self._describe(index) for index, process in enumerate(self.processes) if process.returncode is None]
                say(f"{', '.join(late)} did not finish within {timeout_seconds:.0f} s of the first rank: ending")
                break
            time.sleep(POLL_SECONDS)
        self._ending.set()
        self.end_all()

    def _finish_at_exit(self) -> None:
        if not self._ending.is_set():
            self.finish()
            if self._cause is not None:
                exit_now()  # the first rank did its part, but the run has failed

    def _watch(self) -> None:
        while not self._ending.is_set():
            if self.look() is not None:
                self.end_all()
                if not self._ending.wait(GRACE_SECONDS):
                    exit_now()  # the main thread may be inside a collective that no signal interrupts
                return
            if all(process.returncode == 0 for process in self.processes):
                return
            time.sleep(POLL_SECONDS)


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
