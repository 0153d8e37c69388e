"""The picture as one PNG, for a README."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_par.picture.colour import NAMES, ink, tint
from lightning_par.picture.picture import Lane, Panel, Picture, format_time
from lightning_par.pipeline.simulate import Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _DPI = 13.0, 160  # inches, dots per inch
_LANE, _LOWEST, _LANES = 0.36, 0.2, 6.0  # inches: height of a lane, at least, and of all lanes before they get lower
_SIDE, _TOP, _BOTTOM = 0.25, 1.05, 0.5  # margins in inches
_COLUMN = 0.95  # inches of a column of bubbles
_BAR = 0.84  # height of a bar, in lanes
_WAIT, _TEXT, _FAINT = "#d9d9d9", "#222222", "#666666"


def write_png(picture: Picture, path: Path) -> None:
    """Draw the first panel with its bubbles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needs no display
    from matplotlib.figure import Figure

    panel = picture.panels[0]
    rows = max(2, len(panel.lanes))
    lanes = rows * max(_LOWEST, min(_LANE, _LANES / rows))
    height = _TOP + _BOTTOM + lanes
    left, right = _SIDE + _longest_name(panel), _SIDE + _COLUMN * len(panel.bubbles)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    bounds = (left / _WIDTH, _BOTTOM / height, (_WIDTH - left - right) / _WIDTH, lanes / height)
    axes = figure.add_axes(bounds)
    inches_per_second = (_WIDTH - left - right) / (panel.limits[1] - panel.limits[0])
    for row, lane in enumerate(panel.lanes):
        _draw_lane(axes, row, lane, panel.limits[0], inches_per_second)
    _finish(axes, panel, picture.has_seconds)
    _bubbles(axes, panel)
    _head(figure, picture, panel, height)
    figure.savefig(path, metadata={"Software": None})


def _draw_lane(axes: Axes, row: int, lane: Lane, first: float, inches_per_second: float) -> None:
    """Bars and their labels. An action gets the dots whose middle it covers; one that covers none, only where nothing else is."""
    dot = 1 / (_DPI * inches_per_second)
    bars: list[tuple[float, float]] = []
    waits: list[tuple[float, float]] = []
    colours: list[str] = []
    edge = float("-inf")
    for span in lane.spans:
        start, end = span.start_seconds - first, span.end_seconds - first
        if span.wait_seconds > dot and start > 0:
            waits.append((max(0.0, start - span.wait_seconds), min(start, span.wait_seconds)))
        if round(start / dot) == round(end / dot) and start < edge + 2 * dot:
            continue
        edge = end
        colour = tint(span.action.kind, lane.stages.index(span.action.stage), len(lane.stages))
        if end - start < 12 * dot:  # on whole dots: bars that are drawn on parts of dots have seams between them
            start, end = round(start / dot) * dot, max(round(end / dot), round(start / dot) + 1) * dot
        bars.append((start, end - start))
        colours.append(colour)
        _label(axes, row, (start + end) / 2, span, (end - start) * inches_per_second, colour)
    place = (row - _BAR / 2, _BAR)
    axes.broken_barh(waits, place, facecolors="none", edgecolors=_WAIT, hatch="//////", linewidth=0, zorder=1)
    lines = [0.6 if width > 12 * dot else 0 for _, width in bars]
    axes.broken_barh(bars, place, facecolors=colours, edgecolors="white", linewidth=lines, zorder=2)


def _label(axes: Axes, row: int, middle: float, span: Span, inches: float, colour: str) -> None:
    """The action where its name fits, else its microbatch, else nothing."""
    text, short = str(span.action), str(span.action.microbatch)
    for words, points in ((text, 8), (short, 8), (short, 6.5)):
        if len(words) * 0.68 * points / 72 < inches:
            axes.text(middle, row, words, ha="center", va="center_baseline", fontsize=points, color=ink(colour), zorder=3)
            return


def _finish(axes: Axes, panel: Panel, has_seconds: bool) -> None:
    axes.set_ylim(len(panel.lanes) - 0.5, -0.5)
    axes.set_yticks(range(len(panel.lanes)), [_name(lane) for lane in panel.lanes], fontsize=9, color=_TEXT, ha="left")
    axes.tick_params(axis="y", pad=72 * _longest_name(panel))
    length = panel.limits[1] - panel.limits[0]
    axes.set_xlim(0, length)
    axes.xaxis.set_major_formatter(lambda value, position: format_time(value, has_seconds, length) if value else "0")
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=8, labelcolor=_FAINT, length=3, color=_FAINT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    axes.spines["bottom"].set_position(("outward", 3))


def _name(lane: Lane) -> str:
    many = len(lane.stages) > 1
    return f"{lane.label} · stage{'s' if many else ''} {' '.join(map(str, lane.stages))}"


def _longest_name(panel: Panel) -> float:
    """Inches for the names of the lanes."""
    return 0.15 + 9 / 72 * 0.55 * max(len(_name(lane)) for lane in panel.lanes)


def _bubbles(axes: Axes, panel: Panel) -> None:
    """A column for each kind of bubble, right of the lanes."""
    for column, (name, values) in enumerate(panel.bubbles.items()):
        offset = 72 * (_COLUMN * (column + 1) - 0.1)

        def put(text: str, row: float, offset: float = offset, **style: Any) -> None:
            where: Any = axes.get_yaxis_transform()
            axes.annotate(text, (1, row), (offset, 0), where, "offset points", ha="right", annotation_clip=False, **style)

        put(f"bubble\n{name}", -0.62, va="bottom", fontsize=8, color=_FAINT)
        for row, value in enumerate(values):
            put(f"{value:.1%}", row, va="center_baseline", fontsize=9, color=_TEXT)


def _head(figure: Any, picture: Picture, panel: Panel, height: float) -> None:
    """Title, what is shown of it, and the legend."""
    from matplotlib.patches import Patch

    figure.text(_SIDE / _WIDTH, 1 - 0.3 / height, picture.title, fontsize=13, fontweight="bold", color=_TEXT, va="center")
    time = format_time(panel.limits[1] - panel.limits[0], picture.has_seconds)
    parts = [part for part in (panel.step, panel.replica, time) if part]
    if any(len(lane.stages) > 1 for lane in panel.lanes):
        parts.append("lighter: a later stage of the rank")
    figure.text(_SIDE / _WIDTH, 1 - 0.58 / height, "  ·  ".join(parts), fontsize=9, color=_FAINT, va="center")
    present = {span.action.kind for lane in panel.lanes for span in lane.spans}
    handles = [Patch(facecolor=tint(kind, 0, 1), label=f"{kind}  {name}") for kind, name in NAMES.items() if kind in present]
    handles.append(Patch(facecolor="none", edgecolor=_WAIT, hatch="//////", linewidth=0, label="wait"))
    figure.legend(
        handles=handles, ncols=len(handles), loc="center right", bbox_to_anchor=(1 - 0.2 / _WIDTH, 1 - 0.3 / height), frameon=False,
        fontsize=9, handlelength=1.2, handleheight=1.1, columnspacing=1.4, borderaxespad=0, borderpad=0,
    )  # fmt: skip
