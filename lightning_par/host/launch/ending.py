"""How a process of a run ends, and what is seen of it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
from typing import NoReturn

MISCONFIGURED = 2  # the exit code of a configuration that cannot work
SAME_SIGNAL_SECONDS = 1.0  # who signals a whole group of processes, of which one passes it on, has signalled once


class Stopped(SystemExit):
    """Every rank ends, because the run was asked to stop; exit code 0."""


def say(message: str) -> None:
    """A line of this package on standard error."""
    print(f"lightning_par: {message}", file=sys.stderr, flush=True)


def exit_now(code: int = 1) -> NoReturn:
    """End this process, whatever its threads are doing."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def show_stacks_when_aborted() -> None:
    """Have SIGABRT print the Python stacks of all threads before it ends this process, also where no Python can run."""
    if not faulthandler.is_enabled():
        faulthandler.enable(file=2)  # the descriptor: sys.stderr may be something that is no file


def abort_process(pid: int) -> None:
    """End a process that does not answer, with its stacks shown, where `show_stacks_when_aborted` was called in it.

    Once: a second SIGABRT ends it in the middle of its stacks.
    """
    send_signal(pid, signal.SIGABRT)
    send_signal(pid, signal.SIGCONT)  # one that is stopped takes no signal but this


def send_signal(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
