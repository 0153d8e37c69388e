"""Where each rank of a device mesh is drawn, in units of one cell."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_par.picture.mesh.mesh import MeshPicture

_LONGEST = 32  # ranks in a line, where nodes are not known or larger
_GAP = 0.3  # between two tp groups, and between two columns of lines
_LETTER = 0.16  # width of a letter of a label
_SHAPE = 1.7  # width by height that is aimed at


@dataclass(frozen=True)
class Placement:
    """A picture's cells and labels.

    Attributes:
        cells: left and top of the square of each rank; its sides are 1.
        labels: words, their left, and the middle of their line.
        width, height: of all of it.
    """

    cells: tuple[tuple[float, float], ...]
    labels: tuple[tuple[str, float, float], ...]
    width: float
    height: float


def place_ranks(mesh: MeshPicture) -> Placement:
    """Lines one below the other, in as many columns as give the picture about the shape of a screen."""
    lines = list(mesh.lines(_LONGEST))
    tp = mesh.layout.tp
    label = _LETTER * max(len(line.label) for line in lines) + _GAP
    longest = max(lines, key=lambda line: len(line.ranks)).ranks
    width = label + len(longest) + _GAP * (1 + (longest[-1] // tp - longest[0] // tp))
    height = _column_height(len(lines), mesh.layout.pp, width)
    columns = -(-len(lines) // height)
    cells: list[tuple[float, float]] = []
    labels: list[tuple[str, float, float]] = []
    for number, line in enumerate(lines):
        column, row = divmod(number, height)
        left, top = column * (width + _GAP), row * (1 + _GAP)
        labels.append((line.label, left, top + 0.5))
        first = line.ranks[0]
        cells += [(round(left + label + rank - first + _GAP * (rank // tp - first // tp), 3), round(top, 3)) for rank in line.ranks]
    return Placement(tuple(cells), tuple(labels), columns * (width + _GAP) - _GAP, height * (1 + _GAP) - _GAP)


def _column_height(lines: int, pp: int, width: float) -> int:
    """Lines in a column. Whole pp coordinates, or an even part of one, are worth a picture up to e times as wide or as high."""
    each = lines // pp

    def cost(height: int) -> float:
        shape = width * -(-lines // height) / (height * (1 + _GAP))
        is_even = lines % pp == 0 and (each % height == 0 or height % each == 0)
        return abs(math.log(shape / _SHAPE)) + (not is_even)

    return min(range(1, lines + 1), key=cost)
