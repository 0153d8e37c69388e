"""The times of replicas for a terminal, for a page, and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

from benchmarks.facts import machine, versions
from benchmarks.rendering import markdown_table, terminal_table
from benchmarks.replica_pace import Row
from benchmarks.replicas import DEPTH, LENGTH, NUM_RANKS, ROWS, VOCABULARY, WIDTH, Trainee

HEADINGS = ("sharded", "system", "step ms", "median", "to DeepSpeed", "median", "CPU ms", "to DeepSpeed")
_NUM_WORDS = 2  # of the headings: columns that are no numbers
DEEPSPEED = "DeepSpeed"
_SHARDED = ("nothing", "states (1)", "and gradients (2)", "and parameters (3)")
_SECTION = f"""\
## ZeRO

A GPT on {NUM_RANKS} replicas with AdamW, fp32, no clipping. All systems train it in the same processes in turns, there and back
(ABBA), after their losses in three steps of SGD were those of one process.

- step: forward, backward, reductions and the optimizer's step, of the slowest rank; the quickest and the median
- to DeepSpeed: as a multiple of DeepSpeed's own loop (`engine(...)`, `engine.backward`, `engine.step`) at the same stage
- freed memory stays with the process, for all systems: what the C library gives back, and when, is luck
- CPU: what the busiest rank's process computes in a step; what it waits for the other one or for a core is no part of it

Made by `python -m benchmarks.zero --markdown`.
"""


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What stands under `HEADINGS`, by stage. A system that computes something else than one process has no times."""
    return [_line(row, rows) for row in sorted(rows, key=lambda row: (row.zero, row.system != "lightning_par"))]


def _line(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    if row.wrong:
        return (_SHARDED[row.zero], row.system, "wrong", *[""] * (len(HEADINGS) - 3))
    other = next((each for each in rows if each.system == DEEPSPEED and each.zero == row.zero and not each.wrong), None)
    return (
        _SHARDED[row.zero],
        row.system,
        f"{1000 * min(row.seconds):.1f}",
        f"{1000 * median(row.seconds):.1f}",
        "" if other is None else f"{min(row.seconds) / min(other.seconds):.2f}",
        "" if other is None else f"{median(row.seconds) / median(other.seconds):.2f}",
        f"{1000 * min(row.cpu_seconds):.1f}",
        "" if other is None else f"{min(row.cpu_seconds) / min(other.cpu_seconds):.2f}",
    )


def render_table(rows: Sequence[Row]) -> str:
    """The times as a table for a terminal."""
    return terminal_table(f"Steps of {NUM_RANKS} replicas", HEADINGS, _NUM_WORDS, lines(rows))


def render_markdown(rows: Sequence[Row]) -> str:
    """The section of benchmarks/RESULTS.md."""
    facts = [f"- {name}: {value}" for name, value in _facts(rows).items()]
    return "\n".join([_SECTION, *markdown_table(HEADINGS, _NUM_WORDS, lines(rows)), "", *facts])


def render_json(rows: Sequence[Row]) -> str:
    """Every time, with where it was taken."""
    return json.dumps({**_facts(rows), "rows": [asdict(row) for row in rows]}, indent=2)


def _facts(rows: Sequence[Row]) -> dict[str, str]:
    millions = sum(p.numel() for p in Trainee().parameters()) / 1e6
    return {
        "model": f"GPT of {millions:.1f} million parameters: width {WIDTH}, depth {DEPTH}, vocabulary {VOCABULARY}",
        "batch": f"{ROWS} rows of {LENGTH} tokens for each replica",
        "steps": ", ".join(f"{count} for each" for count in sorted({len(row.seconds) for row in rows if not row.wrong})),
        "machine": machine(),
        "versions": versions("torch", "deepspeed"),
    }
