"""Pipeline schedules: pure functions from (stages, microbatches) to a table, one file each.

A new schedule is one file and one line of `SCHEDULES`; the tests run over the registry.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_par.errors import ConfigurationError
from lightning_par.pipeline.action import Table
from lightning_par.pipeline.schedules.forward_only import forward_only
from lightning_par.pipeline.schedules.gpipe import gpipe
from lightning_par.pipeline.schedules.one_f_one_b import one_f_one_b

__all__ = ["SCHEDULES", "build_schedule", "forward_only", "gpipe", "one_f_one_b"]

SCHEDULES: dict[str, Callable[[int, int], Table]] = {"1f1b": one_f_one_b, "gpipe": gpipe}


def build_schedule(name: str, num_stages: int, num_microbatches: int) -> Table:
    """The training table of the schedule called ``name``.

    Raises:
        ConfigurationError: no schedule has that name; lists those that exist.
    """
    if name not in SCHEDULES:
        raise ConfigurationError(f"schedule={name}: no such pipeline schedule: use one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](num_stages, num_microbatches)
