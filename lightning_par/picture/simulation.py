"""A schedule in time without a training: from the words of `lightning-par simulate` to a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_par.errors import ConfigurationError
from lightning_par.layout import Layout, parse_layout
from lightning_par.picture.bubble import schedule_bubbles
from lightning_par.picture.picture import Lane, Panel, Picture
from lightning_par.pipeline.schedules import SCHEDULES, build_schedule, check_schedule, default_chunks, default_schedule
from lightning_par.pipeline.simulate import Costs, Timeline, simulate

TIMES = {"forward": 1.0, "input": 1.0, "weight": 1.0, "transfer": 0.0}  # keys of costs, and what they are when left out
_KEYS = ("parallel", "schedule", *TIMES)


@dataclass(frozen=True)
class Simulation:
    """A schedule on imaginary ranks.

    Attributes:
        layout: pp, vp and microbatches.
        schedule: its name.
        timeline: what would run when, in the unit of the costs.
        picture: the same, to be drawn.
    """

    layout: Layout
    schedule: str
    timeline: Timeline
    picture: Picture

    @property
    def name(self) -> str:
        """Of a folder for the picture: ``pp4_vp2_mb8-interleaved``."""
        return f"{self.layout}-{self.schedule}"

    @property
    def ideal(self) -> float:
        """The time that the work would take if it were divided evenly over the ranks and none were ever idle."""
        return (1 - self.timeline.bubble_fraction) * self.timeline.makespan_seconds


def read_simulation(words: Sequence[str]) -> Simulation:
    """Simulate what the words ask for.

    Args:
        words: as typed: ``parallel=pp4_vp2_mb8``, ``schedule=interleaved``, ``forward=1.5``, ``weight=[1,1,2,1]``.

    Raises:
        ConfigurationError: a word that cannot be read, a layout without a pipeline, a schedule that cannot run it.
    """
    values = _values(words)
    if "parallel" not in values:
        raise ConfigurationError("simulate needs a layout with a pipeline: add a word such as parallel=pp4_mb8")
    layout = parse_layout(values["parallel"])
    if layout.pp == 1:
        raise ConfigurationError(f"parallel={values['parallel']} has no pipeline to simulate (pp 1): add pp2 or more")
    schedule = values.get("schedule") or default_schedule(layout.vp)
    chunks = default_chunks(schedule) if layout.vp == 1 else layout.vp
    microbatches = layout.microbatches or 2 * layout.pp
    check_schedule(schedule, layout.pp, chunks, microbatches)
    layout = Layout(pp=layout.pp, vp=chunks, microbatches=microbatches, placement=SCHEDULES[schedule].placement)
    table = build_schedule(schedule, layout.pp, layout.vp, microbatches)
    timeline = simulate(table, _costs(values, layout))
    return Simulation(layout, schedule, timeline, _picture(layout, schedule, timeline))


def _values(words: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in _KEYS or not equals or not value:
            raise ConfigurationError(f"{word}: simulate takes {', '.join(_KEYS)}, each as KEY=VALUE, such as forward=1.5")
        if key in values:
            raise ConfigurationError(f"{word}: {key} is given twice, and first as {values[key]}: keep one of them")
        values[key] = value
    return values


def _costs(values: dict[str, str], layout: Layout) -> Costs:
    times = {key: _times(key, values[key]) if key in values else [default] for key, default in TIMES.items()}
    if len(times["transfer"]) > 1:
        raise ConfigurationError(f"transfer={values['transfer']}: every transfer takes the same time: write one number")
    for key in ("forward", "input", "weight"):
        if len(times[key]) not in (1, layout.num_stages):
            raise ConfigurationError(
                f"{key}={values[key]} has {len(times[key])} times, and {layout} has {layout.num_stages} stages: give one time for "
                "each stage, or one for all"
            )
    if not any(map(sum, (times["forward"], times["input"], times["weight"]))):
        raise ConfigurationError("forward, input and weight are all 0, and nothing would take any time: give one of them a time")

    def by_stage(key: str) -> list[float]:
        return times[key] * layout.num_stages if len(times[key]) == 1 else times[key]

    return Costs(by_stage("forward"), by_stage("input"), by_stage("weight"), times["transfer"][0])


def _times(key: str, value: str) -> list[float]:
    """``1.5`` or ``[1,1,2,1]``."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    try:
        times = [float(part) for part in inner.split(",")]
    except ValueError:
        times = [math.nan]
    if not all(math.isfinite(time) and time >= 0 for time in times) or (inner is value and len(times) > 1):
        raise ConfigurationError(f"{key}={value} is no time: write a number of at least 0, or one for each stage as [1,1,2,1]")
    return times


def _picture(layout: Layout, schedule: str, timeline: Timeline) -> Picture:
    bubbles = {
        "simulated": timeline.idle_fraction,
        "equal costs": schedule_bubbles(timeline.rows, Costs.equal(layout.num_stages)),
    }
    lanes = tuple(Lane(f"rank {rank}", rank, row) for rank, row in enumerate(timeline.rows))
    return Picture(f"{schedule}, {layout}, simulated", (Panel("", "", lanes, bubbles),), has_seconds=False)
