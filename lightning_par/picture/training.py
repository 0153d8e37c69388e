"""A training as one PNG: its loss, its throughput, and the memory of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_par.picture.colour import tint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE, _DPI = (9.0, 8.0), 120  # inches, dots per inch
_TEXT, _FAINT = "#222222", "#666666"
_GIB = 2**30
_MARKED = 40  # points that are marked one by one; a longer curve is a line


@dataclass(frozen=True)
class TrainingPicture:
    """What is drawn.

    Attributes:
        title: of what.
        losses: steps and losses.
        rate_name: of the throughput, such as ``tokens/second``.
        rates: steps and throughputs.
        memory: the most bytes that each rank has stored.
        stages: the pp coordinate of each rank.
    """

    title: str
    losses: Sequence[tuple[int, float]]
    rate_name: str
    rates: Sequence[tuple[int, float]]
    memory: Sequence[float]
    stages: Sequence[int]


def write_training_png(picture: TrainingPicture, path: Path) -> None:
    """Draw it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needs no display
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_SIZE, dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(picture.title, fontsize=12, fontweight="bold", color=_TEXT)
    loss, rate, memory = figure.subplots(3, 1)
    _curve(loss, picture.losses, "loss", tint("B", 0, 1))
    _curve(rate, picture.rates, picture.rate_name, tint("F", 0, 1))
    rate.set_ylim(bottom=0)
    rate.set_xlabel("step", fontsize=9, color=_FAINT)
    last = max(picture.stages)
    colours = [tint("W", stage, last + 1) for stage in picture.stages]
    memory.bar(range(len(picture.memory)), [each / _GIB for each in picture.memory], color=colours)
    memory.set_xlabel("rank; lighter: a later stage" if last else "rank", fontsize=9, color=_FAINT)
    _finish(memory, "peak memory, GiB")
    for axes in (loss, rate, memory):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, metadata={"Software": None})


def _curve(axes: Axes, points: Sequence[tuple[int, float]], name: str, colour: str) -> None:
    steps, values = [step for step, _ in points], [value for _, value in points]
    axes.plot(steps, values, color=colour, linewidth=1.6, marker="o" if len(points) <= _MARKED else "", markersize=3)
    _finish(axes, name)


def _finish(axes: Axes, name: str) -> None:
    axes.set_ylabel(name, fontsize=9, color=_FAINT)
    axes.tick_params(labelsize=8, labelcolor=_FAINT, color=_FAINT)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
