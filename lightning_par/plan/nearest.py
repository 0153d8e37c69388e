"""What to type in the place of a layout that is refused: the nearest ones on the same devices, tried out where that can be done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from lightning_par.errors import ConfigurationError
from lightning_par.layout import Layout, nearest_layouts

NUM_NAMED = 2
_MOST_SECONDS = 20.0  # of trying out: a large model takes long for each, and somebody waits for the refusal
_Try = Callable[[Layout], Any]
_tries: ContextVar[_Try | None] = ContextVar("tries", default=None)


@contextmanager
def tried_by(attempt: _Try) -> Iterator[None]:
    """Inside, the layouts that an error names have been tried out. Where this is entered already, the outer one does it.

    Args:
        attempt: called with one layout after the other, for 20 seconds at most; raises a `ConfigurationError` where one does not
            work.
    """
    token = None if _tries.get() is not None else _tries.set(attempt)
    try:
        yield
    finally:
        if token is not None:
            _tries.reset(token)


@contextmanager
def untried() -> Iterator[None]:
    """Inside, layouts are named by the rule alone that they keep: where refusals are many, or nobody reads them."""
    token = _tries.set(_take)
    try:
        yield
    finally:
        _tries.reset(token)


def use_instead(layout: Layout, fits: Callable[[Layout], bool]) -> str:
    """``use parallel=A or parallel=B``: the nearest layouts that keep a rule and, inside `tried_by`, work.

    Args:
        layout: what is refused; its devices are used.
        fits: the rule.
    """
    near = _first_working(_near(layout, fits), _tries.get() or _take)
    return "use " + (" or ".join(f"parallel={one}" for one in near) or "one device (parallel=single)")


def use_smaller(layout: Layout) -> str:
    """``use parallel=A or parallel=B``: layouts whose ranks store less, as far as `tried_by` says so; empty where it says of none.

    Args:
        layout: what does not fit; its devices are used.
    """
    attempt = _tries.get() or _take
    if attempt is _take:
        return ""
    near = _first_working(_spread_further(layout), attempt)
    return "use " + " or ".join(f"parallel={one}" for one in near) if near else ""


def _spread_further(layout: Layout) -> Iterator[Layout]:
    """The layout itself and those near it, each as it is and with more of its states over dp."""
    for near in (layout, *_near(layout)):
        if near != layout:
            yield near
        if (near.dp or 1) > 1:
            yield from (replace(near, zero=zero) for zero in (1, 3) if zero > near.zero)


def _near(layout: Layout, fits: Callable[[Layout], bool] = lambda near: True) -> list[Layout]:
    found = nearest_layouts(layout, layout.world_size, count=layout.world_size**2, fits=fits)
    return [near for near in found if near != layout]


def _take(layout: Layout) -> None:
    """Nothing is tried."""


def _first_working(layouts: Iterable[Layout], attempt: _Try) -> list[Layout]:
    found, end = list[Layout](), time.monotonic() + _MOST_SECONDS
    with untried():
        for layout in layouts:
            if len(found) == NUM_NAMED or time.monotonic() > end:
                break
            if _works(attempt, layout):
                found.append(layout)
    return found


def _works(attempt: _Try, layout: Layout) -> bool:
    try:
        attempt(layout)
    except ConfigurationError:
        return False
    return True
