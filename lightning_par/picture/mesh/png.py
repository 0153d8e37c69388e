"""The device mesh as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_par.picture.colour import hue, ink
from lightning_par.picture.mesh.mesh import MeshPicture
from lightning_par.picture.mesh.place import Placement, place_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _DPI, _SIDE = 13.0, 160, 0.3  # inches, dots per inch, inches of margin
_CELL = 0.72  # inches of a cell's side, at most
_TOP, _LINE = 0.85, 0.24  # inches above the cells, and of a line of words below them
_INDENT, _LETTER = 0.28, 0.072  # inches from a colour to its words, and of a letter, on the average
_TEXT, _FAINT = "#222222", "#666666"
_SQUARE = 0.94  # of a cell's side: a hair of paper between two
_READABLE, _ROOMY = 4.0, 7.0  # points from which there is a rank in a square, and its coordinates too
_MOST_KEYS = 12  # pp coordinates that are named in words


def write_mesh_png(mesh: MeshPicture, path: Path) -> None:
    """Draw every rank, and below what the colours and the axes are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needs no display
    from matplotlib.figure import Figure

    placed = place_ranks(mesh)
    cell = min(_CELL, (_WIDTH - 2 * _SIDE) / placed.width)
    inside = "; in the squares rank, and pp, dp, tp" if _points(cell) > _ROOMY else ""
    keys, links = _keys(mesh), [f"{axis}: {words}" for axis, words in mesh.links.items()]
    longest = max(1.6 * len(mesh.title), *map(len, (mesh.summary + inside, *links, *(words for _, words in keys))))
    width = min(_WIDTH, 2 * _SIDE + max(cell * placed.width, _INDENT + _LETTER * longest))
    below = _TOP + cell * placed.height + _LINE
    height = below + _LINE * (len(keys) + len(links) + 0.5)
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)  # inches from the top left
    axes.text(_SIDE, 0.3, mesh.title, fontsize=13, fontweight="bold", color=_TEXT, va="center")
    axes.text(_SIDE, 0.56, mesh.summary + inside, fontsize=9, color=_FAINT, va="center")
    _draw_ranks(axes, mesh, placed, cell)
    _draw_words(axes, below, keys, links)
    figure.savefig(path, metadata={"Software": None})


def _draw_words(axes: Axes, top: float, keys: list[tuple[str, str]], links: list[str]) -> None:
    """What the colours mean, then what the axes send, a line each."""
    for number, (colour, words) in enumerate(keys):
        _squares(axes, [(_SIDE, top + _LINE * number - 0.1)], 0.17, [colour])
        axes.text(_SIDE + _INDENT, top + _LINE * number, words, fontsize=9, color=_TEXT, va="center_baseline")
    for number, words in enumerate(links, start=len(keys)):
        axes.text(_SIDE, top + _LINE * number, words, fontsize=9, color=_FAINT, va="center_baseline")


def _draw_ranks(axes: Axes, mesh: MeshPicture, placed: Placement, cell: float) -> None:
    """The squares, and in them ranks and coordinates where these can be read."""
    coordinates = [mesh.layout.coordinate_of(rank) for rank in range(mesh.layout.world_size)]
    corners = [(_SIDE + cell * left, _TOP + cell * top) for left, top in placed.cells]
    _squares(axes, corners, cell, [hue(at.pp) for at in coordinates])
    points = _points(cell)
    if points < _READABLE:
        return
    for label, left, middle in placed.labels:
        axes.text(_SIDE + cell * left, _TOP + cell * middle, label, fontsize=points, color=_TEXT, va="center_baseline")
    for rank, (at, (left, top)) in enumerate(zip(coordinates, corners, strict=True)):
        words = f"{rank}\n{at.pp}, {at.dp}, {at.tp}" if points > _ROOMY else str(rank)
        across, down = left + _SQUARE * cell / 2, top + _SQUARE * cell / 2
        axes.text(across, down, words, fontsize=points, color=ink(hue(at.pp)), ha="center", va="center", linespacing=1.5)


def _points(cell: float) -> float:
    """Size of the words in a cell of so many inches."""
    return min(9.0, 72 * cell * 0.28)


def _squares(axes: Axes, corners: list[tuple[float, float]], side: float, colours: list[str]) -> None:
    from matplotlib.collections import PolyCollection

    edge = _SQUARE * side
    shapes = [[(x, y), (x + edge, y), (x + edge, y + edge), (x, y + edge)] for x, y in corners]
    axes.add_collection(PolyCollection(shapes, facecolors=colours, linewidths=0, snap=False), autolim=False)


def _keys(mesh: MeshPicture) -> list[tuple[str, str]]:
    """Colours and what the ranks in them hold, for the first pp coordinates and the last."""
    words = [(hue(pp), f"pp {pp}: {holding.words}") for pp, holding in enumerate(mesh.holdings)]
    hidden = len(words) - _MOST_KEYS
    return words if hidden <= 0 else [*words[: _MOST_KEYS - 2], ("#ffffff", f"... {hidden + 1} more"), words[-1]]
