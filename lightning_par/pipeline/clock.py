"""When a rank's actions begin and end, and for how long it waits for its neighbours inside them.

The executor calls a clock around what it does::

    begin(F3)   wait()  arrive()   end()
       |          |        |         |
       ####.......~~~~~~~~~##########        # computes, ~ waits for the activation of the stage before

A clock only notes the moments; they become `Span`s when the step is over.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from lightning_par.pipeline.action import Action
from lightning_par.pipeline.simulate import Span

Moment = TypeVar("Moment")


class Clock(ABC, Generic[Moment]):
    """Notes the moments of one rank's actions.

    Attributes:
        zero_ns: the host's monotonic time, in nanoseconds, from which this rank's seconds count. It is one clock for all
            processes of a machine (CLOCK_MONOTONIC), so that ranks of a machine are compared by it without any error. Machines
            count from moments of their own: let their ranks call `zero` right after a barrier.
    """

    def __init__(self) -> None:
        self.zero()

    def zero(self) -> None:
        """Forget what was noted; seconds count from now, when all that was asked of the device before is done."""
        self._count_from(self._settled())
        self.zero_ns = time.perf_counter_ns()

    def restart(self) -> None:
        """Forget what was noted; seconds count from where the device is now. Waits for nothing, and leaves ``zero_ns``."""
        self._count_from(self._now())

    def _count_from(self, zero: Moment) -> None:
        self._open: list[Moment] = []
        self._noted: list[tuple[Action, list[Moment]]] = []
        self._zero = zero

    def begin(self, action: Action) -> None:
        """The rank turns to ``action``."""
        self._open = [self._now()]
        self._noted.append((action, self._open))

    def wait(self) -> None:
        """It needs what a neighbour has to send. Between `begin` and `end`, as often as the action receives."""
        self._open.append(self._now())

    def arrive(self) -> None:
        """What it waited for is there."""
        self._open.append(self._now())

    def end(self) -> None:
        """The action is done, and its result handed to the transport."""
        self._open.append(self._now())

    def spans(self) -> tuple[Span, ...]:
        """The actions so far, in order, in seconds since `zero`.

        A span has the waiting before its start, as in a simulated timeline: what an action computed before it waited is counted
        after it. So ``end_seconds - start_seconds`` is exactly the time in which the rank worked.
        """
        self._settled()
        return tuple(self._span(action, moments) for action, moments in self._noted)

    def _span(self, action: Action, moments: list[Moment]) -> Span:
        begin, *waits, end = (self._seconds(self._zero, moment) for moment in moments)
        waited = sum(arrived - asked for asked, arrived in zip(waits[::2], waits[1::2], strict=True))
        return Span(action, begin + waited, end, waited)

    @abstractmethod
    def _now(self) -> Moment:
        """This moment, noted without waiting for anything."""

    @abstractmethod
    def _settled(self) -> Moment:
        """This moment, once all that was asked of the device before it is done."""

    @abstractmethod
    def _seconds(self, first: Moment, second: Moment) -> float:
        """Seconds between two moments that are over."""


class WallClock(Clock[int]):
    """The host's time: of a pipeline on a CPU, where a call returns when its work is done."""

    _now = staticmethod(time.perf_counter_ns)
    _settled = staticmethod(time.perf_counter_ns)

    def _seconds(self, first: int, second: int) -> float:
        return (second - first) * 1e-9


class CudaClock(Clock[Any]):
    """The device's time: events on the current stream, read when the step is over, so that the host never waits during it.

    Args:
        make_event: makes an event with timing; by default torch.cuda's.
        synchronize: waits for the device; by default torch.cuda's.
    """

    def __init__(self, make_event: Callable[[], Any] | None = None, synchronize: Callable[[], None] | None = None) -> None:
        if make_event is None or synchronize is None:
            import torch

            make_event = make_event or _timed_event
            synchronize = synchronize or torch.cuda.synchronize
        self._make_event, self._synchronize = make_event, synchronize
        super().__init__()

    def _now(self) -> Any:
        event = self._make_event()
        event.record()
        return event

    def _settled(self) -> Any:
        event = self._now()
        self._synchronize()
        return event

    def _seconds(self, first: Any, second: Any) -> float:
        return first.elapsed_time(second) * 1e-3  # torch gives milliseconds


def _timed_event() -> Any:
    import torch

    return torch.cuda.Event(enable_timing=True)
