"""The side of the other ranks: reports through a pipe, heartbeats through memory, an end with the first rank."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from lightning_par.host.launch.ending import abort_process, exit_now, say, send_signal, show_stacks_when_aborted
from lightning_par.host.launch.pulse import Pulse

PARENT = "LIGHTNING_PAR_PARENT"  # in the environment of the others: what `link_words` says
TURN_SECONDS = 0.5
_SHOW_SECONDS = 3.0  # for the first rank to show its stacks


def link_words(parent: int, reports: int, memory: int, index: int) -> dict[str, str]:
    """What the first rank adds to the environment of another.

    Args:
        parent: the first rank's process id.
        reports: the descriptor of the pipe.
        memory: that of the shared memory.
        index: which of the others it is, from 0.
    """
    return {PARENT: f"{parent} {reports} {memory} {index}"}


@dataclass(frozen=True)
class Link:
    """What ties this rank to the first one; its supervisor.

    Attributes:
        parent: the first rank's process id.
        reports: the descriptor of the pipe to it.
        index: which of the other ranks this one is, from 0.
        pulse: heartbeats.
    """

    parent: int
    reports: int
    index: int
    pulse: Pulse
    counts_heartbeats: ClassVar[bool] = True

    def report(self, words: str) -> None:
        """Tell the first rank why this one is about to end."""
        try:
            os.write(self.reports, f"{self.index} {' '.join(words.split())[:1000]}\n".encode())  # short: written whole
        except OSError:  # the first rank is gone
            return

    def expect(self, seconds: float) -> None:
        """See `runtime.watchdog.Supervisor`."""
        self.pulse.expect(seconds)

    def end(self, words: str) -> None:
        """See `runtime.watchdog.Supervisor`."""
        self.report(words)
        exit_now()


class Unlinked:
    """The supervisor of a rank that torchrun or SLURM started: they see it end, and end the others."""

    counts_heartbeats = False

    def expect(self, seconds: float) -> None:
        """Nobody listens."""

    def end(self, words: str) -> None:
        """See `runtime.watchdog.Supervisor`."""
        exit_now()


@lru_cache
def join_parent() -> Link | None:
    """In a rank that `RankProcesses` started: end this process soon after the one that started it is gone.

    Returns:
        The link to it, or ``None`` in any other process. The same at every call.
    """
    words = os.environ.pop(PARENT, None)  # popped: a program that this rank starts is not one of the ranks
    if words is None:
        return None
    parent, reports, memory, index = map(int, words.split())
    link = Link(parent, reports, index, Pulse(memory, 1 + index))
    show_stacks_when_aborted()
    threading.Thread(target=_live_with, args=(link,), daemon=True, name="parent-watcher").start()
    return link


def report_failure(error: BaseException) -> None:
    """In a rank that `RankProcesses` started: tell the first rank why this one is about to end.

    Not for Ctrl-C, which the terminal sends to every rank.
    """
    link = join_parent()
    if link is not None and not isinstance(error, KeyboardInterrupt):
        link.report(f"raised {type(error).__name__}: {error}")


def _live_with(link: Link) -> None:
    while os.getppid() == link.parent:
        link.pulse.beat()
        seconds = link.pulse.silent_seconds(0, TURN_SECONDS)
        if seconds and link.index == 0:  # one of us is enough
            say(f"the first rank of this machine has not answered for {seconds:.0f} s: ending all ranks")
            abort_process(link.parent)
            time.sleep(_SHOW_SECONDS)
            send_signal(link.parent, signal.SIGKILL)
        time.sleep(TURN_SECONDS)
    os._exit(1)
