"""The device mesh as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from lightning_par.picture.colour import hue, ink
from lightning_par.picture.mesh.mesh import Line, MeshPicture
from lightning_par.plan.render import listed

_MOST_RANKS = 64  # that are drawn one by one
_MOST_LINES = 16  # of pp coordinates, where ranks are not


def print_mesh(mesh: MeshPicture, console: Console) -> None:
    """Print where each rank is, in the colour of its pp coordinate, or of many ranks each pp coordinate; and what axes send."""
    console.print(f"Mesh: {mesh.summary}", highlight=False)
    for line in _ranks(mesh, console.width) if mesh.layout.world_size <= _MOST_RANKS else _coordinates(mesh):
        console.print(line, no_wrap=True, overflow="ignore", crop=False)
    for axis, words in mesh.links.items():
        console.print(f"{axis}: {words}", markup=False, highlight=False)


def _ranks(mesh: MeshPicture, width: int) -> Iterator[Text]:
    """``node 0  pp 0 dp 0 [0 1]  pp 0 dp 1 [2 3]``."""
    layout = mesh.layout
    label = max(len(line.label) for line in mesh.lines(1))
    group = len(_begin(mesh, 0)) + layout.tp * (_digits(layout.world_size) + 1)
    for line in mesh.lines((width - label) // group * layout.tp):
        text = Text(f"{line.label:<{label}}")
        for rank in line.ranks:
            _add_rank(text, mesh, line, rank)
        yield text


def _add_rank(text: Text, mesh: MeshPicture, line: Line, rank: int) -> None:
    """A rank, and what begins and ends its tp group; a group that goes on in another line has dots there."""
    at = mesh.layout.coordinate_of(rank)
    text.append(_begin(mesh, rank) if at.tp == 0 or rank == line.ranks[0] else " ")
    text.append(f"{rank:>{_digits(mesh.layout.world_size)}}", f"{ink(hue(at.pp))} on {hue(at.pp)}")
    if at.tp == mesh.layout.tp - 1:
        text.append("]")
    elif rank == line.ranks[-1]:
        text.append("…")


def _begin(mesh: MeshPicture, rank: int) -> str:
    """What stands before a tp group: the coordinates that its ranks share, but for a pp that begins the line."""
    at = mesh.layout.coordinate_of(rank)
    pp = f"  pp {at.pp:>{_digits(mesh.layout.pp)}}" if mesh.devices_per_node else " "
    return f"{pp} dp {at.dp:>{_digits(mesh.layout.dp or 1)}} {'…' if at.tp else '['}"


def _digits(count: int) -> int:
    """Of the largest number below ``count``."""
    return len(str(count - 1))


def _coordinates(mesh: MeshPicture) -> Iterator[Text]:
    """A line for each pp coordinate, or for the first ones and the last."""
    pp = mesh.layout.pp
    first = pp if pp <= _MOST_LINES else _MOST_LINES - 1
    yield from (_coordinate(mesh, place) for place in range(first))
    if first < pp:
        yield Text(f"... {pp - first - 1} more")
        yield _coordinate(mesh, pp - 1)


def _coordinate(mesh: MeshPicture, pp: int) -> Text:
    """``pp 0  ranks 0-127, nodes 0-15, stages 0, 4, 32 x tp 4``."""
    layout, per_node = mesh.layout, mesh.devices_per_node
    each = layout.world_size // layout.pp
    first, last = pp * each, (pp + 1) * each - 1
    nodes = f", nodes {_span(first // per_node, last // per_node)}" if per_node else ""
    stages = listed(mesh.holdings[pp].stages)
    words = f"  ranks {_span(first, last)}{nodes}, stages {stages}, {layout.dp} x tp {layout.tp}"
    return Text().append(f"pp {pp}", f"{ink(hue(pp))} on {hue(pp)}").append(words)


def _span(first: int, last: int) -> str:
    return f"{first}-{last}" if first < last else f"{first}"
