"""Times of searches as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from benchmarks.facts import machine, versions
from benchmarks.rendering import markdown_table, terminal_table

if TYPE_CHECKING:
    from benchmarks.search_pace import Row

HEADINGS = ("model", "best", "devices", "batch", "ways that fit", "analysis CPU s", "search CPU s")
_NUM_WORDS = 2
_SECTION = """\
## Search

How long `lightning-par plan` takes: a Llama-shaped model is taken apart once (analysis: of each row what those above it have not
needed), then every layout of the cluster is searched (the median of five); seconds of one core. 405 billion parameters do not fit
on 32 devices: there the search says so, and what comes nearest.

Made by `python -m benchmarks.search --markdown`.
"""


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What stands under `HEADINGS`."""
    return [
        (
            row.model,
            row.best or "nothing fits",
            f"{row.num_devices:,}",
            f"{row.batch:,}",
            f"{row.num_considered:,}",
            f"{row.analysis_seconds:.1f}",
            f"{row.search_seconds:.2f}",
        )
        for row in rows
    ]


def render_table(rows: Sequence[Row]) -> str:
    """For a terminal."""
    return terminal_table("Search", HEADINGS, _NUM_WORDS, lines(rows))


def render_markdown(rows: Sequence[Row]) -> str:
    """The section of RESULTS.md."""
    table = "\n".join(markdown_table(HEADINGS, _NUM_WORDS, lines(rows)))
    where = f"- machine: {machine().removesuffix(', gloo')}\n- versions: {versions('torch', 'transformers', 'numpy')}"
    return f"{_SECTION}\n{table}\n\n{where}\n"


def render_json(rows: Sequence[Row]) -> str:
    """Everything."""
    return json.dumps([asdict(row) for row in rows])
