"""What came of the runs that lost a rank, as a table: a line for each thing that a rank was doing when it was killed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

from benchmarks.fault import ENDED, HANG_SECONDS, LAYOUT, Outcome
from benchmarks.rendering import markdown_table, terminal_table

HEADINGS = (
    "killed while",
    "runs",
    f"hangs over {HANG_SECONDS:.0f} s",
    "unreadable checkpoints",
    "not resumed",
    "another end",
    "s to the end of all: median",
    "most",
    "s until training again: median",
    "most",
)


def lines_of(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """The table's lines; the last is of all runs."""
    doings = sorted({outcome.doing for outcome in outcomes})
    groups = [(doing, [outcome for outcome in outcomes if outcome.doing == doing]) for doing in doings]
    return [_line(*group) for group in [*groups, ("all", list(outcomes))]]


def faults(outcomes: Sequence[Outcome]) -> list[str]:
    """What is not as it should be; empty where every run has survived."""
    counts = {
        f"runs in which ranks were left after {HANG_SECONDS:.0f} s": sum(outcome.end_seconds is None for outcome in outcomes),
        "checkpoints that cannot be read": sum(outcome.unreadable for outcome in outcomes),
        "runs that did not go on": sum(not outcome.has_resumed for outcome in outcomes),
        "runs that had ended before their rank was killed": sum(outcome.doing == ENDED for outcome in outcomes),
        "runs that learned something else": sum(not outcome.is_equal for outcome in outcomes),
    }
    return [f"{count} {what}" for what, count in counts.items() if count]


def render_table(outcomes: Sequence[Outcome]) -> str:
    """For a terminal."""
    return terminal_table(f"{len(outcomes)} runs in {LAYOUT}, one rank killed in each", HEADINGS, 1, lines_of(outcomes))


def render_markdown(outcomes: Sequence[Outcome]) -> str:
    """For benchmarks/RESULTS.md."""
    words = f"{len(outcomes)} runs of a small model in {LAYOUT} under `max_restarts`, one random rank killed in each."
    return "\n".join(["## Faults", "", words, "", *markdown_table(HEADINGS, 1, lines_of(outcomes))])


def render_json(outcomes: Sequence[Outcome]) -> str:
    """Every run."""
    return json.dumps([asdict(outcome) for outcome in outcomes], indent=2)


def _line(doing: str, outcomes: list[Outcome]) -> tuple[str, ...]:
    ends = [outcome.end_seconds for outcome in outcomes if outcome.end_seconds is not None]
    restarts = [outcome.restart_seconds for outcome in outcomes if outcome.restart_seconds is not None]
    return (
        doing,
        str(len(outcomes)),
        str(sum(outcome.end_seconds is None for outcome in outcomes)),
        str(sum(outcome.unreadable for outcome in outcomes)),
        str(sum(not outcome.has_resumed for outcome in outcomes)),
        str(sum(not outcome.is_equal for outcome in outcomes)),
        *_spread(ends),
        *_spread(restarts),
    )


def _spread(seconds: list[float]) -> tuple[str, str]:
    return (f"{median(seconds):.1f}", f"{max(seconds):.1f}") if seconds else ("", "")
