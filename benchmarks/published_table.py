"""Forecasts of published runs as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from benchmarks.rendering import markdown_table, terminal_table

if TYPE_CHECKING:
    from benchmarks.published_forecast import Row

HEADINGS = ("source", "run", "layout", "published s", "forecast s", "error")
_NUM_WORDS = 3
_SECTION = """\
## Published runs

Steps that others have measured, forecast by the planner from the model and the layout alone. Nothing is calibrated on them: rates
are those of `conf/cluster`. What the sources say is in `benchmarks/published_runs.py`.

- the runs are of other programs, with kernels that join operations and reductions that travel during the backward; the forecast
  is of this one, with operations as transformers writes them
- of arXiv 2205.05198 all four sizes; of torchtitan the rows without torch.compile, float8 and context parallelism; of
  arXiv 2104.04473 all of table 1, which says neither the samples of a microbatch nor the stages of a rank: taken are those that are
  forecast to be quickest and fit
- Megatron-Bridge's dense rows for H100 (its performance summary of 25.11: Llama 3 8B, 70B, 405B) are all in FP8, for which the
  planner has no rate yet, so that none of them is here

Made by `python -m benchmarks.published --markdown`.
"""


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What stands under `HEADINGS`."""
    return [
        (row.run.source, row.run.name, str(row.layout), f"{row.run.seconds:.3g}", f"{row.seconds:.3g}", f"{row.error:+.1%}")
        for row in rows
    ]


def mean_error(rows: Sequence[Row]) -> float:
    """The mean of the errors without their signs."""
    return sum(abs(row.error) for row in rows) / len(rows)


def render_table(rows: Sequence[Row]) -> str:
    """For a terminal."""
    return f"{terminal_table('Published runs', HEADINGS, _NUM_WORDS, lines(rows))}\nmean error {mean_error(rows):.1%}"


def render_markdown(rows: Sequence[Row]) -> str:
    """The section of RESULTS.md."""
    table = "\n".join(markdown_table(HEADINGS, _NUM_WORDS, lines(rows)))
    return f"{_SECTION}\n{table}\n\n- mean error, without signs: {mean_error(rows):.1%}\n"


def render_json(rows: Sequence[Row]) -> str:
    """Everything."""
    return json.dumps([{**asdict(row), "error": row.error} for row in rows])
