"""The bytes for a terminal, for a page, for programs, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.facts import machine, versions
from benchmarks.rendering import markdown_table, terminal_table
from benchmarks.storage import BATCH, DEPTH, HEADS, KINDS, LENGTH, WIDTH, Row
from lightning_par.picture.colour import COLOURS

HEADINGS = ("layout", "ranks", *KINDS, "forecast of activations", "off by")
_NUM_WORDS = 2  # of the headings: columns that are no numbers
_COLOURS = dict(zip(KINDS, (COLOURS["F"], COLOURS["B"], COLOURS["I"], COLOURS["W"]), strict=True))
_TEXT, _FAINT = "#222222", "#666666"
_SECTION = """\
## Memory of a rank

Bytes that a rank stores in a training step, measured: the storages of live tensors, each once. Gradients are those of all
microbatches, before their one reduction; activations are the most between two actions of the schedule. Parameters, gradients and
states are what the forecast says, to the byte, or the command fails; activations may be off by 3 %. The forecast is made before any
rank is started, from the plan, the user's optimizer and a run of each stage on fake tensors.

Not in the table: messages on their way between stages, buckets of a reduction, parameters that ZeRO-3 has gathered, and what the
operations of an action give each other. Made by `python -m benchmarks.memory --markdown`.
"""


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What stands under `HEADINGS`: a line for all ranks of a layout that store the same."""
    found: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        activations, expected = row.measured["activations"], row.expected["activations"]
        numbers = (*(f"{row.measured[kind]:,}" for kind in KINDS), f"{expected:,}", f"{(activations - expected) / expected:+.2%}")
        found.setdefault((row.case, *numbers), []).append(row.rank)
    return [(case, ", ".join(map(str, ranks)), *numbers) for (case, *numbers), ranks in found.items()]


def render_table(rows: Sequence[Row]) -> str:
    """The bytes as a table for a terminal."""
    return terminal_table("Bytes on a rank", HEADINGS, _NUM_WORDS, lines(rows))


def render_markdown(rows: Sequence[Row]) -> str:
    """The section of benchmarks/RESULTS.md."""
    facts = [f"- {name}: {value}" for name, value in _facts().items()]
    return "\n".join([_SECTION, *markdown_table(HEADINGS, _NUM_WORDS, lines(rows)), "", *facts])


def render_json(rows: Sequence[Row]) -> str:
    """Every number, with where it was made."""
    return json.dumps({**_facts(), "rows": [asdict(row) for row in rows]}, indent=2)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A bar for each rank, of the measured bytes, with a mark where the forecast ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needs no display
    from matplotlib.figure import Figure

    height = 1.3 + 0.3 * len(rows)
    figure = Figure(figsize=(10, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.24, 0.5 / height, 0.73, 1 - 1.3 / height))
    starts = [0.0] * len(rows)
    for kind in KINDS:
        sizes = [row.measured[kind] / 2**20 for row in rows]
        axes.barh(range(len(rows)), sizes, 0.78, starts, color=_COLOURS[kind], edgecolor="white", linewidth=0.6, label=kind)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    for place, row in enumerate(rows):
        end = sum(row.expected[kind] for kind in KINDS) / 2**20
        axes.plot([end, end], [place - 0.46, place + 0.46], color=_TEXT, linewidth=1.6, label="" if place else "forecast")
    axes.set_yticks(range(len(rows)), [f"{row.case} · rank {row.rank}" for row in rows], fontsize=9, color=_TEXT)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g} MiB" if value else "0")
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=8, labelcolor=_FAINT, length=3, color=_FAINT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    figure.text(0.02, 1 - 0.3 / height, "Memory of a rank", fontsize=13, fontweight="bold", color=_TEXT, va="center")
    figure.legend(
        ncols=5, loc="center right", bbox_to_anchor=(0.98, 1 - 0.3 / height), frameon=False, fontsize=9, handlelength=1.2,
        columnspacing=1.4,
    )  # fmt: skip
    figure.savefig(path, metadata={"Software": None})


def _facts() -> dict[str, str]:
    """What was counted and where; bytes do not depend on the machine."""
    return {
        "model": f"the demo's GPT, width {WIDTH}, {DEPTH} blocks, {HEADS} heads, AdamW in two groups, fp32; {BATCH} sequences of "
        f"{LENGTH} tokens for each replica",
        "machine": machine(),
        "versions": versions("torch", "deepspeed", "pytorch-lightning"),
    }
