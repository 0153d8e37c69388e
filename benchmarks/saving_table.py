"""The times of saves and loads for a terminal, for a page, and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

from benchmarks.facts import machine, versions
from benchmarks.rendering import markdown_table, terminal_table
from benchmarks.saving_pace import BACKGROUND, NUM_RANKS, OURS, RAW, WORD, Row

HEADINGS = ("system", "save s", "median", "GB/s", "of raw", "load s", "median", "GB/s", "of raw")
_NUM_WORDS = 1
_SECTION = f"""\
## Checkpoints

The model states of a GPT with AdamW under {WORD}, written and read by {NUM_RANKS} processes in turns, there and back. Files are
synced to the disk before a save counts; what is read comes from the file system's cache, for all systems.

- save, load: of the slowest rank; the quickest and the median
- in background: `async_save`, how long training waits; the files follow while it goes on
- of raw: bandwidth as a fraction of that of raw writes and reads of as many bytes

Made by `python -m benchmarks.checkpoint --markdown`.
"""


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What stands under `HEADINGS`."""
    raw = next(row for row in rows if row.system == RAW)
    return [
        (row.system, *_cells(row, row.save_seconds, raw.save_seconds), *_cells(row, row.load_seconds, raw.load_seconds))
        for row in rows
    ]


def _cells(row: Row, seconds: Sequence[float], raw: Sequence[float]) -> tuple[str, ...]:
    if not seconds:
        return ("", "", "", "")
    bandwidth = "" if row.system == BACKGROUND else f"{row.state_bytes / min(seconds) / 1e9:.2f}"
    share = "" if row.system == BACKGROUND else f"{min(raw) / min(seconds):.2f}"
    return (f"{min(seconds):.3f}", f"{median(seconds):.3f}", bandwidth, share)


def render_table(rows: Sequence[Row]) -> str:
    """The times as a table for a terminal, with what they were of."""
    return "\n".join([terminal_table("Saves and loads", HEADINGS, _NUM_WORDS, lines(rows)), "", *_fact_lines(rows)])


def render_markdown(rows: Sequence[Row]) -> str:
    """The section of benchmarks/RESULTS.md."""
    return "\n".join([_SECTION, *markdown_table(HEADINGS, _NUM_WORDS, lines(rows)), "", *_fact_lines(rows)])


def render_json(rows: Sequence[Row]) -> str:
    """Every time, with where it was taken."""
    return json.dumps({**_facts(rows), "rows": [asdict(row) for row in rows]}, indent=2)


def _fact_lines(rows: Sequence[Row]) -> list[str]:
    return [f"- {name}: {value}" for name, value in _facts(rows).items()]


def _facts(rows: Sequence[Row]) -> dict[str, str]:
    ours, waiting = (next(row for row in rows if row.system == name) for name in (OURS, BACKGROUND))
    return {
        "bytes": f"{ours.written_bytes:,} written of a state of {ours.state_bytes:,}",
        "in background": f"training waits for {min(waiting.save_seconds) / min(ours.save_seconds):.1%} of the time of a save",
        "machine": machine(),
        "versions": versions("torch", "safetensors", "xxhash"),
    }
