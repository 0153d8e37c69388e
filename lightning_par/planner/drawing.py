"""The best layout of a search as pictures: what its ranks store, what travels over which link, where the time of a step goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_par.picture import write_picture
from lightning_par.plan.memory import RankMemory
from lightning_par.planner.estimate import Estimate
from lightning_par.planner.page import PARTS, STORED, plan_page, timeline_picture
from lightning_par.planner.report import where
from lightning_par.planner.search import Outlook

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE, _DPI = (13.0, 7.5), 160  # inches, dots per inch
_TEXT, _FAINT = "#222222", "#666666"


def write_pictures(outlook: Outlook, folder: Path, tokens: int | None = None) -> list[Path]:
    """Draw the best layout into ``folder``, which is made where there is none.

    Args:
        outlook: what was found.
        folder: where to.
        tokens: of a sample; None where samples have none.

    Returns:
        ``plan.html``, ``plan.png``, and of a pipeline its timeline as a page, a PNG and a Chrome trace.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "plan.html", folder / "plan.png"]
    written[0].write_text(plan_page(outlook, tokens), encoding="utf-8")
    _write_png(outlook, written[1])
    best = outlook.best[0]
    if best.timeline is not None:
        written += write_picture(timeline_picture(best), folder)
    return written


def _write_png(outlook: Outlook, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needs no display
    from matplotlib.figure import Figure

    best = outlook.best[0]
    figure = Figure(figsize=_SIZE, dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.1, 1.0))
    _memory(figure.add_subplot(grid[0, 0]), best.memory, outlook.cluster.device.usable_bytes)
    _traffic(figure.add_subplot(grid[0, 1]), best)
    _steps(figure.add_subplot(grid[1, :]), outlook)
    cluster = outlook.cluster
    figure.suptitle(
        f"{best.candidate.words} on {cluster.num_nodes} x {cluster.devices_per_node} devices of {cluster.name}", color=_TEXT
    )
    figure.savefig(path, metadata={"Software": None})


def _memory(axes: Axes, memory: tuple[RankMemory, ...], usable: int) -> None:
    """A bar for each pp coordinate."""
    places, bottoms = range(len(memory)), [0.0] * len(memory)
    for kind, colour in STORED.items():
        sizes = [getattr(each, kind) / 2**30 for each in memory]
        if any(sizes):
            axes.bar(places, sizes, 0.8, bottoms, color=colour, label=kind)
            bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    usable_gib = usable / 2**30
    if max(bottoms) > usable_gib / 4:  # else the bars would be too low to be read
        axes.axhline(usable_gib, color="black", linewidth=1, linestyle=":", label="what tensors get")
    _finish(axes, f"What a rank stores, of the {usable_gib:.3g} GiB that tensors get", "GiB")
    axes.set_xticks(list(places)[:: max(1, len(memory) // 16)])
    axes.set_xlabel("pp", color=_FAINT)
    axes.margins(y=0.3)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")


def _traffic(axes: Axes, best: Estimate) -> None:
    """A bar for each axis."""
    axis_names = [axis for axis, size in best.sent_bytes.items() if size]
    sizes = [best.sent_bytes[axis] / 2**30 for axis in axis_names]
    axes.bar(axis_names, sizes, 0.5, color=[PARTS[axis] for axis in axis_names])
    for place, (axis, size) in enumerate(zip(axis_names, sizes, strict=True)):
        axes.annotate(f"{size:.3g} GiB\n{where(best, axis)}", (place, size), ha="center", va="bottom", fontsize=8, color=_TEXT)
    if not axis_names:
        axes.annotate("nothing travels", (0.5, 0.5), xycoords="axes fraction", ha="center", color=_FAINT)
    axes.margins(y=0.25)
    _finish(axes, "What a rank sends in a step, over each axis", "GiB")


def _steps(axes: Axes, outlook: Outlook) -> None:
    """A bar for each of the best layouts, the best on top."""
    places, lefts = range(len(outlook.best)), [0.0] * len(outlook.best)
    for part, colour in PARTS.items():
        seconds = [estimate.parts[part] * 1e3 for estimate in outlook.best]
        if any(seconds):
            axes.barh(places, seconds, 0.7, lefts, color=colour, label=part)
            lefts = [left + each for left, each in zip(lefts, seconds, strict=True)]
    axes.set_yticks(places, [estimate.candidate.words.removeprefix("parallel=") for estimate in outlook.best], fontsize=8)
    axes.invert_yaxis()
    _finish(axes, "Where the time of a step goes, of the best layouts", "")
    axes.set_xlabel("ms", color=_FAINT)
    axes.legend(frameon=False, fontsize=8, ncols=len(PARTS), loc="upper right", bbox_to_anchor=(1.0, 1.12))


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_TEXT)
    axes.set_ylabel(unit, color=_FAINT)
    axes.tick_params(labelsize=8, colors=_TEXT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
