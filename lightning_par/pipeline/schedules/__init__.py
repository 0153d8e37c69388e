"""Pipeline schedules: pure functions from (ranks, stages on each, microbatches) to a table, one file each.

A new schedule is one file and one line of `SCHEDULES`; the tests run over the registry.
"""

from __future__ import annotations

from lightning_par.errors import ConfigurationError
from lightning_par.pipeline.action import Table
from lightning_par.pipeline.schedules.forward_only import forward_only
from lightning_par.pipeline.schedules.gpipe import gpipe
from lightning_par.pipeline.schedules.interleaved import interleaved
from lightning_par.pipeline.schedules.interleaved_zb import interleaved_zb
from lightning_par.pipeline.schedules.one_f_one_b import one_f_one_b
from lightning_par.pipeline.schedules.schedule import Schedule
from lightning_par.pipeline.schedules.zb_h1 import zb_h1
from lightning_par.pipeline.schedules.zb_v import zb_v

__all__ = [
    "AUTO", "SCHEDULES", "Schedule", "build_schedule", "check_schedule", "default_chunks", "default_schedule", "forward_only",
]  # fmt: skip

SCHEDULES: dict[str, Schedule] = {
    schedule.name: schedule
    for schedule in (
        Schedule("1f1b", one_f_one_b),
        Schedule("gpipe", gpipe),
        Schedule("interleaved", interleaved, least_chunks=2, most_chunks=None, fills_ranks=True),
        Schedule("zb-h1", zb_h1, splits_backward=True, fills_ranks=True),
        Schedule("interleaved-zb", interleaved_zb, least_chunks=2, most_chunks=None, splits_backward=True, fills_ranks=True),
        Schedule("zb-v", zb_v, least_chunks=2, most_chunks=2, placement="v", splits_backward=True, fills_ranks=True),
    )
}
AUTO = "auto"  # the word for a table made for the costs of the stages, see `auto`


def build_schedule(name: str, num_ranks: int, num_chunks: int, num_microbatches: int) -> Table:
    """The training table of the schedule called ``name``, for any number of microbatches.

    Raises:
        ConfigurationError: no schedule has that name; lists those that exist.
    """
    return _named(name).build(num_ranks, num_chunks, num_microbatches)


def default_schedule(num_chunks: int) -> str:
    """The schedule of a run that names none."""
    return "1f1b" if num_chunks == 1 else "interleaved"


def default_chunks(name: str) -> int:
    """Stages on each rank where the layout does not say: as many as the schedule must have if there is no choice, else 1."""
    if name == AUTO:
        return 1
    schedule = _named(name)
    return schedule.least_chunks if schedule.least_chunks == schedule.most_chunks else 1


def check_schedule(name: str, pp: int, vp: int, microbatches: int | None = None) -> None:
    """Check that a schedule can run a layout.

    Args:
        name: as the user typed it.
        pp: ranks of the pipeline.
        vp: stages on each.
        microbatches: pieces of a batch; ``None`` while they are not known.

    Raises:
        ConfigurationError: no schedule has that name, it cannot have so many stages on a rank, or it is made for more
            microbatches; each with what would do.
    """
    if name == AUTO:
        return
    schedule = _named(name)
    if not schedule.has_chunks(vp):
        raise ConfigurationError(f"schedule={name} {_wrong_chunks(schedule, vp)}")
    least = schedule.least_microbatches(pp)
    if microbatches is not None and microbatches < least:
        plain = "schedule=1f1b" if vp == 1 else "schedule=1f1b without vp"
        raise ConfigurationError(
            f"schedule={name} on pp{pp} needs at least {least} microbatches, one for each rank, and the layout has "
            f"mb{microbatches}: use mb{least} or more, or {plain}, which runs with any number"
        )


def _named(name: str) -> Schedule:
    if name not in SCHEDULES:
        raise ConfigurationError(f"schedule={name}: no such pipeline schedule: use one of {', '.join([*SCHEDULES, AUTO])}")
    return SCHEDULES[name]


def _wrong_chunks(schedule: Schedule, vp: int) -> str:
    """The rule that ``vp`` stages on each rank break, and what to do."""
    others = [other.name for other in SCHEDULES.values() if other.has_chunks(vp)]
    same = [name for name in others if SCHEDULES[name].splits_backward == schedule.splits_backward]
    other = f"schedule={(same or others)[0]}"
    has = f"and the layout has {'one' if vp == 1 else f'vp{vp}'}"
    if schedule.most_chunks is None:
        return f"takes turns between several stages of a rank, {has}: use vp{schedule.least_chunks} or more, or {other}"
    if schedule.most_chunks == 1:
        return f"runs one stage on each rank, {has}: use {other}, or leave vp out"
    return f"runs exactly {schedule.most_chunks} stages on each rank, {has}: use vp{schedule.most_chunks} or {other}"
