"""A calibration as its user sees it: seconds of each block, and the links."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_par.planner.calibration import Calibration, Series
from lightning_par.planner.report import seconds

_KINDS = {"F": "forward", "I": "input gradients", "W": "weight gradients"}
_CAPTION = "an empty cell: the same work as that of a block above"


def print_calibration(found: Calibration, left_out: Sequence[str], console: Console) -> None:
    """Print what was measured.

    Args:
        found: that.
        left_out: what there was no time or no memory for.
        console: where to.
    """
    console.print(f"measured on {found.device}, torch {found.torch}:", markup=False, highlight=False)
    table = Table("block", caption=_CAPTION, caption_justify="left")
    for heading in ("rows", *_KINDS.values()):
        table.add_column(heading, justify="right", no_wrap=True)
    blocks: dict[str, dict[str, Series]] = {}
    for series in found.series.values():
        kind, _, name = series.of.partition(" of ")
        blocks.setdefault(name, {})[kind] = series
    for name, actions in blocks.items():
        rows = sorted(next(iter(actions.values())).seconds)
        table.add_row(name, _span(str(rows[0]), str(rows[-1])), *(_cell(actions.get(kind)) for kind in _KINDS))
    console.print(table)
    for name, title in (("inside", "inside a node"), ("between", "between nodes")):
        link = found.links.get(name)
        rate = (
            "not measured"
            if link is None
            else f"{link.bytes_per_second / 1e9:.3g} GB/s, {link.latency_seconds * 1e6:.3g} us a message"
        )
        console.print(f"{title}: {rate}", markup=False, highlight=False)
    for words in left_out:
        console.print(f"- {words}", markup=False, highlight=False)


def _cell(series: Series | None) -> str:
    if series is None:
        return ""
    rows = sorted(series.seconds)
    return _span(seconds(series.seconds[rows[0]]), seconds(series.seconds[rows[-1]]))


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"
