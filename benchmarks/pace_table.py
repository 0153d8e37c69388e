"""The times of pipelines for a terminal, for a page, and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

from benchmarks.facts import machine, versions
from benchmarks.napping import NUM_BLOCKS, NUM_MICROBATCHES, NUM_RANKS, WIDTH
from benchmarks.pace import IDEAL_SECONDS, WORK_SECONDS, Row
from benchmarks.rendering import markdown_table, terminal_table

HEADINGS = (
    "schedule",
    "system",
    "step ms",
    "median",
    "to DeepSpeed",
    "overhead %",
    "made up %",
    "theory %",
    "without work ms",
    "median",
    "to torch",
    "CPU ms",
    "to torch",
)
_NUM_WORDS = 2  # of the headings: columns that are no numbers
DEEPSPEED, TORCH = "DeepSpeed", "torch"
_SECTION = f"""\
## Pipeline schedules

p = {NUM_RANKS} ranks, m = {NUM_MICROBATCHES} microbatches. Stages sleep: a rank's share of a microbatch takes \
{1000 * WORK_SECONDS:.0f} ms forward and {2000 * WORK_SECONDS:.0f} ms backward
({1000 * WORK_SECONDS:.0f} input gradients, {1000 * WORK_SECONDS:.0f} weight gradients), so that a rank that never waits needs \
{1000 * IDEAL_SECONDS:.0f} ms. All systems run the
same chain in the same processes in turns, there and back (ABBA); losses and gradients of each were those of one process.

F, I and W of a stage take so much longer than in the step without work, and no more: where a rank wakes late, because another has
the core, or its blocks compute longer than they do without work, because sleep has left their caches to others, its next naps are
so much shorter. What a system does between the blocks is not made up for.

- step: forwards, backwards, one step of SGD; the quickest and the median
- to DeepSpeed: its step, as a multiple of DeepSpeed's PipelineEngine's
- overhead: of the step less the step without work, over the ideal; the quickest of each
- made up: how much longer the blocks computed in that step than in those without work, on the rank where it was most, in points of
  the ideal. Without shorter naps the overhead would be higher by so much
- theory: the overhead of the system's own table by our simulator, where messages take no time
- without work: the step when nothing sleeps, which is the host's own time; to torch: as a multiple of torch's of the same schedule
- CPU: what the busiest rank's process computes in that step; what it waits for other ranks or for a core is no part of it

Made by `python -m benchmarks.pipeline --markdown`.
"""


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What stands under `HEADINGS`. A system that computes something else than one process has no times."""
    return [_line(row, rows) for row in rows]


def ratio(row: Row, rows: Sequence[Row], system: str, of: str = "seconds", schedule: str | None = None) -> float | None:
    """A row's least time as a multiple of another system's; None where one of them has none.

    Args:
        row: whose.
        rows: all.
        system: the other one.
        of: which field of a row.
        schedule: of the other one; None for the same.
    """
    others = [
        other for other in rows if other.system == system and other.schedule == (schedule or row.schedule) and not other.wrong
    ]
    if not others or row.wrong:
        return None
    return float(min(getattr(row, of)) / min(getattr(others[0], of)))


def _line(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    if row.wrong:
        return (row.schedule, row.system, "wrong", *[""] * (len(HEADINGS) - 3))
    return (
        row.schedule,
        row.system,
        f"{1000 * min(row.seconds):.1f}",
        f"{1000 * median(row.seconds):.1f}",
        _ratio(ratio(row, rows, DEEPSPEED, schedule="1f1b")),
        f"{100 * row.overhead:.1f}",
        f"{100 * row.made_up:.1f}",
        f"{100 * row.theory:.1f}",
        f"{1000 * min(row.idle_seconds):.1f}",
        f"{1000 * median(row.idle_seconds):.1f}",
        _ratio(ratio(row, rows, TORCH, "idle_seconds")),
        f"{1000 * min(row.cpu_seconds):.1f}",
        _ratio(ratio(row, rows, TORCH, "cpu_seconds")),
    )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def render_table(rows: Sequence[Row]) -> str:
    """The times as a table for a terminal."""
    title = f"Steps of {NUM_RANKS} ranks and {NUM_MICROBATCHES} microbatches; the ideal is {1000 * IDEAL_SECONDS:.0f} ms"
    return terminal_table(title, HEADINGS, _NUM_WORDS, lines(rows))


def render_markdown(rows: Sequence[Row]) -> str:
    """The section of benchmarks/RESULTS.md."""
    facts = [f"- {name}: {value}" for name, value in _facts(rows).items()]
    return "\n".join([_SECTION, *markdown_table(HEADINGS, _NUM_WORDS, lines(rows)), "", *facts])


def render_json(rows: Sequence[Row]) -> str:
    """Every time, with where it was taken."""
    return json.dumps({**_facts(rows), "rows": [asdict(row) | _shares(row) for row in rows]}, indent=2)


def _shares(row: Row) -> dict[str, float | None]:
    return {name: None if row.wrong else getattr(row, name) for name in ("overhead", "made_up")}


def _facts(rows: Sequence[Row]) -> dict[str, str]:
    counts = {(len(row.seconds), len(row.idle_seconds)) for row in rows if not row.wrong}
    return {
        "model": f"{NUM_BLOCKS} blocks of one linear layer, width {WIDTH}, fp32",
        "steps": ", ".join(f"{work} with work and {idle} without, for each" for work, idle in counts),
        "machine": machine(),
        "versions": versions("torch", "deepspeed"),
    }
