"""Forecasts beside measurements for a terminal, for a page, for programs, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.facts import machine, versions
from benchmarks.foresight_memory import MOST_MEDIAN, MOST_WORST, Peak, activation_errors, inexact
from benchmarks.foresight_memory import Row as Memory
from benchmarks.foresight_time import (
    BETWEEN,
    INSIDE,
    LEAST_CORRELATION,
    MOST_LOSS_ERROR,
    MOST_REGRET,
    SLOWER,
    Row,
    choose,
    median_error,
    rank_correlation,
    regret,
)
from benchmarks.rendering import Lines, markdown_table, terminal_table
from lightning_par.picture.colour import HUES

HEADINGS = (
    "processes", "chosen", "quickest", "layouts", "correlation", "regret %", "chosen ms", "quickest ms", "error %",
)  # fmt: skip
MEMORY_HEADINGS = ("model", "layouts", "ranks", "states off", "activations: median %", "worst %")
PEAK_HEADINGS = ("model", "layout", "measured MiB", "forecast MiB", "error %")
_NUM_WORDS, _NUM_MEMORY_WORDS, _NUM_PEAK_WORDS = 3, 1, 2
_ALL = "all"
_TEXT, _FAINT = "#222222", "#666666"
_SECTION = f"""\
## Foresight

The planner's forecasts beside real runs. Layouts of 2, 4 and 8 processes are trained by the engine that a Trainer's strategy
installs, on devices that sleep for every product as long as their rate says, by the operands that a rank really multiplies, over
links that a token bucket slows down below torch.distributed, for lightning_par and DeepSpeed alike. The planner is asked for a
cluster of that rate and of those links; nothing is fitted.

- correlation: Spearman's rank correlation of forecast and measured step times; regret: by how much the layout that the planner
  would choose is slower than the quickest that was measured, at the worst in the last line; error: the median of the forecasts,
  without signs
- a step is the quickest of two, of the slowest rank; layouts within 10 % of the quickest are timed four times more
- links: {INSIDE.bytes_per_second / 1e6:g} MB/s and {INSIDE.latency_seconds * 1e3:g} ms inside a node, \
{BETWEEN.bytes_per_second / 1e6:g} MB/s and {BETWEEN.latency_seconds * 1e3:g} ms between the two nodes of 4 or 8 processes, \
for each process; of 8 processes, which take turns on the cores, devices and links are {SLOWER[8]} times slower
- layouts: every tp, pp, dp and vp that 8 blocks allow with tp inside a node, every schedule that the planner considers, ZeRO 0, 1
  and 3 and sp over tp, with twice as many microbatches as ranks of the pipeline; without ZeRO also with as many, and without sp;
  ZeRO-2 without a pipeline. Left out: other numbers of microbatches, GPipe, tp over nodes, recomputation

Memory is counted as under [Memory of a rank](#memory-of-a-rank), in 12 layouts of three models; the forecast is the planner's,
which adds up blocks that it has run one by one. Parameters, gradients and states are exact to the byte or the command fails.

Made by `python -m benchmarks.foresight --markdown --output docs/foresight.png`.

![Forecast and measured step times](../docs/foresight.png)
"""


@dataclass(frozen=True)
class Findings:
    """What was measured.

    Attributes:
        times: of layouts.
        memory: of ranks.
        peaks: on a GPU; empty without one.
    """

    times: Sequence[Row]
    memory: Sequence[Memory]
    peaks: Sequence[Peak] = ()


def by_world(rows: Sequence[Row]) -> Mapping[str, list[Row]]:
    """The layouts of each number of processes."""
    worlds = sorted({row.world for row in rows})
    return {str(world): [row for row in rows if row.world == world] for world in worlds}


def overall_correlation(rows: Sequence[Row]) -> float:
    """Of the layouts of all numbers of processes."""
    return rank_correlation([row.forecast for row in rows], [row.measured for row in rows])


def wrong(found: Findings) -> list[str]:
    """One line for each line of the issue that does not hold."""
    lines = []
    for world, rows in {**by_world(found.times), _ALL: list(found.times)}.items():
        correlation = overall_correlation(rows)
        if correlation < LEAST_CORRELATION:
            lines.append(f"{world} processes: the rank correlation is {correlation:.3f}, less than {LEAST_CORRELATION}")
        if world != _ALL and regret(rows) > MOST_REGRET:
            lines.append(f"{world} processes: {choose(rows).words} is {regret(rows):.1%} slower than the quickest")
    lines += [
        f"{row.world} processes, {row.words}: the loss is off by {row.loss_error:.1e} of that in one process"
        for row in found.times
        if not row.loss_error <= MOST_LOSS_ERROR
    ]
    lines += inexact(found.memory)
    middle, worst = activation_errors(found.memory)
    if middle > MOST_MEDIAN or worst > MOST_WORST:
        lines.append(f"activations are off by {middle:.1%} in the median and {worst:.1%} at the worst")
    return lines


def time_lines(rows: Sequence[Row]) -> Lines:
    """What stands under `HEADINGS`."""
    found = []
    for world, its in by_world(rows).items():
        chosen, quickest = choose(its), min(its, key=lambda row: row.measured)
        milliseconds = [f"{1e3 * row.measured:.0f}" for row in (chosen, quickest)]
        words = (row.words.removeprefix("parallel=") for row in (chosen, quickest))
        found.append((world, *words, *_numbers(its, regret(its)), *milliseconds, _error(its)))
    worst = max(regret(its) for its in by_world(rows).values())
    return [*found, (_ALL, "", "", *_numbers(rows, worst), "", "", _error(rows))]


def _numbers(rows: Sequence[Row], regret: float) -> tuple[str, ...]:
    return str(len(rows)), f"{overall_correlation(rows):.3f}", f"{100 * regret:.1f}"


def _error(rows: Sequence[Row]) -> str:
    return f"{100 * median_error(rows):.1f}"


def memory_lines(rows: Sequence[Memory]) -> Lines:
    """What stands under `MEMORY_HEADINGS`."""
    models = {model: [row for row in rows if row.model == model] for model in dict.fromkeys(row.model for row in rows)}
    found = []
    for model, its in {**models, _ALL: list(rows)}.items():
        middle, worst = activation_errors(its)
        cases = {(row.model, row.stored.case) for row in its}
        errors = (f"{100 * middle:.2f}", f"{100 * worst:.2f}")
        found.append((model, str(len(cases)), str(len(its)), str(len(inexact(its))), *errors))
    return found


def peak_lines(peaks: Sequence[Peak]) -> Lines:
    """What stands under `PEAK_HEADINGS`."""
    return [
        (each.model, each.case, f"{each.measured / 2**20:.1f}", f"{each.expected / 2**20:.1f}", f"{100 * each.error:+.1f}")
        for each in peaks
    ]


def render_table(found: Findings) -> str:
    """For a terminal."""
    tables = [
        terminal_table("Step times", HEADINGS, _NUM_WORDS, time_lines(found.times)),
        terminal_table("Memory of a rank", MEMORY_HEADINGS, _NUM_MEMORY_WORDS, memory_lines(found.memory)),
    ]
    if found.peaks:
        tables.append(terminal_table("Memory on a GPU", PEAK_HEADINGS, _NUM_PEAK_WORDS, peak_lines(found.peaks)))
    return "\n".join(tables)


def render_markdown(found: Findings) -> str:
    """The section of benchmarks/RESULTS.md."""
    facts = [f"- {name}: {value}" for name, value in _facts().items()]
    times = markdown_table(HEADINGS, _NUM_WORDS, time_lines(found.times))
    memory = markdown_table(MEMORY_HEADINGS, _NUM_MEMORY_WORDS, memory_lines(found.memory))
    peaks = ["", *markdown_table(PEAK_HEADINGS, _NUM_PEAK_WORDS, peak_lines(found.peaks))] if found.peaks else []
    return "\n".join([_SECTION, *times, "", *memory, *peaks, "", *facts])


def render_json(found: Findings) -> str:
    """Every number, with where it was made."""
    return json.dumps({**_facts(), **asdict(found)}, indent=2)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A point for each layout, a panel for each number of processes: forecast to the right, measured up; the chosen has a ring."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needs no display
    from matplotlib.figure import Figure

    worlds = by_world(rows)
    figure = Figure(figsize=(3.6 * len(worlds) + 0.4, 4.2), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(worlds), squeeze=False)[0]
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.12, top=0.8, wspace=0.24)
    kinds = list(dict.fromkeys(_kind(row.words) for row in rows))
    for axes, (world, its) in zip(panels, worlds.items(), strict=True):
        most = 1.06 * max(max(row.forecast, row.measured) for row in its)
        axes.plot([0, most], [0, most], color="#bbbbbb", linewidth=1, zorder=1)
        for place, kind in enumerate(kinds):
            alike = [row for row in its if _kind(row.words) == kind]
            axes.scatter(
                [row.forecast for row in alike],
                [row.measured for row in alike],
                s=16, linewidth=0, alpha=0.85, zorder=2, color=HUES[place], label=kind if axes is panels[-1] else "",
            )  # fmt: skip
        chosen = choose(its)
        axes.scatter([chosen.forecast], [chosen.measured], s=90, facecolor="none", edgecolor=_TEXT, linewidth=1.2, zorder=3)
        axes.set(xlim=(0, most), ylim=(0, most), aspect="equal")
        axes.set_title(f"{world} processes, {len(its)} layouts", fontsize=10, color=_TEXT)
        axes.set_xlabel("forecast, s", fontsize=9, color=_FAINT)
        axes.set_ylabel("measured, s" if axes is panels[0] else "", fontsize=9, color=_FAINT)
        axes.tick_params(labelsize=8, labelcolor=_FAINT, color="#bbbbbb")
        for side, spine in axes.spines.items():
            spine.set(visible=side in ("left", "bottom"), color="#bbbbbb")
    figure.text(0.02, 0.95, "A step of every layout", fontsize=13, fontweight="bold", color=_TEXT, va="center")
    figure.legend(ncols=len(kinds), loc="center left", bbox_to_anchor=(0.01, 0.89), frameon=False, fontsize=9, handletextpad=0.2)
    figure.savefig(path, metadata={"Software": None})


def _kind(words: str) -> str:
    """Which axes split the module: tp, pp, both or neither."""
    axes = [axis for axis in ("tp", "pp") if f"{axis}" in words.split()[0].removeprefix("parallel=")]
    return " and ".join(axes) or "replicas alone"


def _facts() -> dict[str, str]:
    return {"machine": machine(), "versions": versions("torch", "deepspeed", "pytorch-lightning", "transformers")}
