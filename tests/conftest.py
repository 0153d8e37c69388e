"""What holds for every test: one that is marked `alone` runs while no other worker of pytest-xdist runs a test."""

from __future__ import annotations

import fcntl
from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Take the place of all workers, or a place among them; who waits for all of it is not overtaken by who comes later."""
    assert item.config.inipath is not None
    with item.config.inipath.open() as door, open(__file__) as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # said, because ranks that were forked have the file open too
