"""Finds a rank that stands still in its own code while others wait for it, and has it ended.

The thread that runs the steps notes what it does; a note is a write of an attribute or two. A daemon thread looks once a
second and counts its looks, so that time in which the whole process was stopped (Ctrl-Z) does not count.

    what a look finds                                                            when the rank is blamed
    an action computes                                                           after max(hang_seconds, 20 x the slowest so far)
    it does so in the first step of its kind, which may compile                  after timeout_seconds
    it compiles, is in a collective or a debugger, or the device is not done     never: its time starts again
    the rank waits for a neighbour, or is outside of a step                      never

[Note: the interpreter's lock] Code in C that holds it also stops the thread that looks. Where a supervisor counts heartbeats, it
ends a rank that has none in a step. Elsewhere, as under torchrun, an `Alarm` does, which each look sets anew.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from lightning_par.runtime.alarm import Alarm
from lightning_par.runtime.stack import reason_to_wait, render_stacks, stacks_of

LOOK_SECONDS = 1.0
SLOWER = 20  # times the slowest action so far: no longer one that is only slow


class Supervisor(Protocol):
    """Who ends a rank, and who may see that it no longer answers."""

    @property
    def counts_heartbeats(self) -> bool:
        """Whether a rank that does not answer is seen."""

    def expect(self, seconds: float) -> None:
        """From now on this rank must answer within so many seconds, or always may be silent (0). Called twice a step."""

    def end(self, words: str) -> None:
        """End the run, because this rank did what ``words`` say. Does not return."""


@dataclass(frozen=True)
class Watch:
    """How a rank is watched.

    Attributes:
        supervisor: who ends it.
        name: of the rank, for the message.
        hang_seconds: how long an action may take where all before took less than a twentieth of that.
        timeout_seconds: how long any action may take.
        is_busy: whether this rank's device has work that is not done, which the host may be waiting for. Called by another thread.
    """

    supervisor: Supervisor
    name: str
    hang_seconds: float
    timeout_seconds: float
    is_busy: Callable[[], bool] = lambda: False


class Watchdog:
    """What this rank does; the listener of an executor. The thread that runs the steps calls all but `look`."""

    def __init__(self) -> None:
        self._action: object = None
        self._doing: tuple[object, bool] | None = None  # another object with each note; whether its step is the first of its kind
        self._is_first = True
        self._finished: set[str] = set()  # kinds of steps that have run to their end
        self._slowest_seconds = 0.0
        self._watch: Watch | None = None
        self._stopping = threading.Event()
        self._alarm = Alarm()
        self._seen: tuple[object, bool] | None = None
        self._num_looks, self._seen_at = 0, 0.0

    def begin(self, action: object) -> None:
        """This rank computes ``action`` from now on."""
        self._action = action
        self._doing = (action, self._is_first)

    def wait(self) -> None:
        """It waits for a neighbour."""
        self._doing = None

    def arrive(self) -> None:
        """It goes on computing."""
        self._doing = (self._action, self._is_first)

    def end(self) -> None:
        """The action has ended."""
        self._doing = None

    @contextmanager
    def step(self, kind: str) -> Iterator[None]:
        """Inside, actions are those of one step of a ``kind``, such as ``train``."""
        self._is_first = kind not in self._finished
        watch = self._watch
        if watch is not None:
            limit = self._limit_seconds(watch, self._is_first)
            watch.supervisor.expect(limit)
            if not watch.supervisor.counts_heartbeats:
                self._alarm.begin(limit + LOOK_SECONDS)
        try:
            yield
            self._finished.add(kind)
        finally:
            self._doing = None
            self._alarm.cancel()
            if watch is not None:
                watch.supervisor.expect(0)

    def start(self, watch: Watch) -> None:
        """Have this thread's steps watched until `stop`. Between steps."""
        self.stop()
        self._watch, self._thread, self._stopping = watch, threading.get_ident(), threading.Event()
        threading.Thread(target=self._look_on, args=(watch, self._stopping), daemon=True, name="watchdog").start()

    def stop(self) -> None:
        """Watch no longer. Between steps, or after one that raised."""
        self._stopping.set()
        self._watch = None

    def _look_on(self, watch: Watch, stopping: threading.Event) -> None:
        while not stopping.wait(LOOK_SECONDS):
            self.look(watch)

    def look(self, watch: Watch) -> None:
        """What the watching thread does once every `LOOK_SECONDS`."""
        doing = self._doing
        self._alarm.extend(self._limit_seconds(watch, self._is_first) + LOOK_SECONDS)
        if doing is None or doing is not self._seen:
            self._learn()
            self._see(doing)
            return
        stacks = stacks_of(self._thread)
        if reason_to_wait(stacks) is not None or watch.is_busy():
            self._see(doing)
            return
        self._num_looks += 1
        action, is_first = doing
        seconds = self._num_looks * LOOK_SECONDS
        if seconds >= self._limit_seconds(watch, is_first) and self._doing is doing:
            words = f"stands still in {action}: {seconds:.0f} s without an end"
            print(f"lightning_par: {watch.name} {words}; it is in\n{render_stacks(stacks)}", file=sys.stderr, flush=True)
            watch.supervisor.end(words)

    def _see(self, doing: tuple[object, bool] | None) -> None:
        self._seen, self._num_looks, self._seen_at = doing, 0, time.monotonic()

    def _learn(self) -> None:
        """Keep how long the action took that was seen until now, at the least; not of one that may have compiled."""
        if self._num_looks and self._seen is not None and not self._seen[1]:
            self._slowest_seconds = max(self._slowest_seconds, time.monotonic() - self._seen_at - LOOK_SECONDS)

    def _limit_seconds(self, watch: Watch, is_first: bool) -> float:
        slow = max(watch.hang_seconds, SLOWER * self._slowest_seconds)
        return watch.timeout_seconds if is_first else min(slow, watch.timeout_seconds)
