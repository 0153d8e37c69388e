"""What the check has found, as tables and one last line."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from lightning_par.parity.check import Report
from lightning_par.parity.compare import Difference

_SHOWN = 5  # gradients and weights


def print_report(report: Report, left_out: Sequence[str], console: Console) -> None:
    """Print what was compared and how far it is apart; the last line says whether that is equal.

    Args:
        report: what was found.
        left_out: what the user asked for and the check did without.
        console: where to.
    """
    found = report.comparison
    steps = f"{len(found.losses)} step{'s' * (len(found.losses) != 1)} of {report.samples} samples"
    _say(console, f"{report.module} as {report.layout}, beside one process: {steps}, float32 on the CPU, {report.size}")
    if report.has_dropped:
        _say(console, "Dropout is left out: every layout draws other masks")
    if left_out:
        _say(console, f"Left out here: {', '.join(left_out)}")
    numbers = Table("", *(_right(name) for name in ("one process", str(report.layout), "error", "allowed")), box=None)
    for each in (*found.losses, *found.norms):
        numbers.add_row(each.name, f"{each.alone:.7g}", f"{each.found:.7g}", *_cells(each))
    console.print(numbers)
    tensors = Table(Column("the worst", overflow="fold"), _right("error"), _right("allowed"), box=None)
    for kind, differences in (("gradient", found.gradients), ("weight", found.weights)):
        for each in differences[:_SHOWN]:
            tensors.add_row(escape(f"{kind} {each.name}"), *_cells(each))
    console.print(tensors)
    rounding = [each.name for each in found.gradients if each.is_rounding]
    if rounding:
        _say(console, f"Nothing but rounding is in the gradient of {_listed(rounding)}")
    _say(console, verdict(report))


def verdict(report: Report) -> str:
    """Whether the layout trains as one process does, in one line."""
    found = report.comparison
    kinds = ("gradient ", found.gradients), ("", found.losses), ("", found.norms), ("weight ", found.weights)
    for kind, differences in kinds:
        different = [each for each in differences if not each.is_equal]
        if different:
            first = different[0]
            return f"differs: worst {kind}{first.name} by {first.error:.1e}, {first.allowed:.0e} allowed; {_count(report)}"
    worst = found.gradients[0]
    return f"equal: {report.layout} trains {report.module} as one process does; worst gradient {worst.name} by {worst.error:.1e}"


def _count(report: Report) -> str:
    """How many of each kind are different."""
    found = report.comparison
    kinds: Sequence[tuple[str, list[Difference]]] = (
        ("gradients", found.gradients),
        ("weights", found.weights),
        ("losses", found.losses),
        ("norms", found.norms),
    )
    return ", ".join(f"{sum(not one.is_equal for one in each)} of {len(each)} {kind}" for kind, each in kinds)


def _cells(each: Difference) -> tuple[str, str]:
    error = f"{each.error:.1e}"
    return (error if each.is_equal else f"[red]{error}[/]"), ("any" if math.isinf(each.allowed) else f"{each.allowed:.0e}")


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
