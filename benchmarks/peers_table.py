"""The matches with all peers for a terminal, for a page, for programs, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import pace_table, replica_table, shard_table, trainer_table
from benchmarks.facts import machine, versions
from benchmarks.peers import NOISE, Match
from benchmarks.rendering import Lines, markdown_table, terminal_table
from lightning_par.picture.colour import HUES

HEADINGS = ("benchmark", "work", "peer", "ours ms", "peer's ms", "ratio", "median", "CPU", "where the peer is quicker")
_NUM_WORDS = 3  # of the headings: columns that are no numbers
_TABLES: dict[str, Any] = {
    "tensor": shard_table.TABLE,
    "zero": replica_table.TABLE,
    "trainer": trainer_table.TABLE,
    "pipeline": pace_table,
}
_TEXT, _FAINT, _LINE = "#222222", "#666666", "#bbbbbb"
_SECTION = f"""\
## Peers

lightning_par beside each system that does the same work, on the same model and data. Each benchmark times its systems in the same
processes in turns, there and back (ABBA), after losses, in pipelines also gradients, were those of one process; what it trains, and
every system's own times, stand in the section that is named after it.

- [tensor](#tensor-parallelism), [zero](#zero): the strategy's step without a Trainer, beside the peer's own loop
- [trainer](#under-a-trainer): whole trainings, with Lightning and lightning_par under the same Trainer
- [pipeline](#pipeline-schedules): schedules of 4 ranks on stages that sleep
- ms: the quickest step of the slowest rank; ratio: ours as a multiple of the peer's, less is better; median: that of the medians
- CPU: that of the processor time of the busiest rank; of pipelines in steps without work
- within noise: not both are above {1 + NOISE:.2f}, the quickest and the median; where both are, for no reason that is known, the
  command fails

Made by `python -m benchmarks.all --markdown --output docs/peers.png`.

![Step times as multiples of the peers'](../docs/peers.png)
"""


def lines(found: Sequence[Match]) -> Lines:
    """What stands under `HEADINGS`."""
    return [
        (
            each.benchmark,
            each.ours.work,
            each.theirs.system,
            f"{1000 * min(each.ours.seconds):.1f}",
            f"{1000 * min(each.theirs.seconds):.1f}",
            f"{each.least:.2f}",
            f"{each.middle:.2f}",
            f"{each.cpu:.2f}",
            each.reason,
        )
        for each in found
    ]


def render_table(found: Sequence[Match]) -> str:
    """For a terminal."""
    return terminal_table("lightning_par beside its peers; less than 1 is quicker", HEADINGS, _NUM_WORDS, lines(found))


def render_markdown(found: Sequence[Match]) -> str:
    """The section of benchmarks/RESULTS.md."""
    facts = [f"- {name}: {value}" for name, value in _facts(found).items()]
    return "\n".join([_SECTION, *markdown_table(HEADINGS, _NUM_WORDS, lines(found)), "", *facts])


def render_json(found: Sequence[Match]) -> str:
    """Every time, with where it was taken."""
    rows = [asdict(each) | {"ratio": each.least, "median": each.middle, "cpu": each.cpu, "reason": each.reason} for each in found]
    return json.dumps({**_facts(found), "noise": NOISE, "matches": rows}, indent=2)


def sections(measured: Mapping[str, Sequence[Any]]) -> list[str]:
    """The sections of benchmarks/RESULTS.md of the benchmarks, by the rows that each has given."""
    return [_TABLES[benchmark].render_markdown(rows) + "\n" for benchmark, rows in measured.items()]


def draw(found: Sequence[Match], path: Path) -> None:
    """A bar for each match, as long as our quickest step is of the peer's; a dot at the medians; the peer is the line at 1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needs no display
    from matplotlib.figure import Figure

    height = 0.24 * len(found) + 1.2
    figure = Figure(figsize=(9.0, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.36, 0.4 / height, 0.61, 1 - 1.15 / height))
    benchmarks = list(dict.fromkeys(each.benchmark for each in found))
    for row, each in enumerate(found):
        axes.barh(row, each.least, height=0.7, color=HUES[benchmarks.index(each.benchmark)], zorder=2)
        axes.plot(
            each.middle, row, "o", markersize=4, markerfacecolor="white", markeredgecolor=_TEXT, markeredgewidth=0.8, zorder=4
        )
    axes.axvspan(1 - NOISE, 1 + NOISE, color="#eeeeee", linewidth=0, zorder=1)
    axes.axvline(1, color=_TEXT, linewidth=0.8, zorder=3)
    axes.set(ylim=(len(found) - 0.4, -0.6), xlim=(0, max(1.2, *(1.03 * max(each.least, each.middle) for each in found))))
    names = [f"{each.benchmark}  {each.ours.work}: {each.theirs.system}" for each in found]
    axes.set_yticks(range(len(found)), names, fontsize=8, color=_TEXT)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, labelcolor=_FAINT, color=_LINE)
    for side, spine in axes.spines.items():
        spine.set(visible=side == "bottom", color=_LINE)
    figure.text(0.02, 1 - 0.3 / height, "Steps of lightning_par", fontsize=13, fontweight="bold", color=_TEXT, va="center")
    words = f"as multiples of each peer's: bar quickest, dot median; grey: within {NOISE:.0%}"
    figure.text(0.02, 1 - 0.56 / height, words, fontsize=9, color=_FAINT, va="center")
    figure.savefig(path, metadata={"Software": None})


def _facts(found: Sequence[Match]) -> dict[str, str]:
    middle = median(each.least for each in found) if found else 1.0
    return {
        "in the median": f"{middle:.2f} times the peer's quickest step, over {len(found)} matches",
        "machine": machine(),
        "versions": versions("torch", "pytorch-lightning", "deepspeed", "transformers"),
    }
