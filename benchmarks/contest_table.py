"""The times of systems that do the same work, for a terminal, for a page, and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from benchmarks.contest import OURS, Row
from benchmarks.facts import machine, versions
from benchmarks.rendering import markdown_table, terminal_table

_NUM_WORDS = 2  # of the headings: columns that are no numbers


@dataclass(frozen=True)
class ContestTable:
    """How the rows of a benchmark are shown.

    Attributes:
        title: above the table in a terminal.
        section: what stands above it on a page.
        against: the systems that others are compared with, the first that does the work.
        facts: gives what was trained.
        packages: whose versions are given.
    """

    title: str
    section: str
    against: tuple[str, ...]
    facts: Callable[[], dict[str, str]]
    packages: tuple[str, ...]

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the columns."""
        other = f"to {self.against[0]}"
        return ("work", "system", "step ms", "median", other, "median", "CPU ms", other)

    def lines(self, rows: Sequence[Row]) -> list[tuple[str, ...]]:
        """What stands under `headings`, ours first in each work. A system that computes something else has no times."""
        works = list(dict.fromkeys(row.work for row in rows))
        ordered = sorted(rows, key=lambda row: (works.index(row.work), row.system != OURS))
        return [self._line(row, rows) for row in ordered]

    def _line(self, row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
        if row.wrong:
            return (row.work, row.system, "wrong", *[""] * 5)
        alike = {each.system: each for each in rows if each.work == row.work and not each.wrong}
        other = next((alike[name] for name in self.against if name in alike), None)
        return (
            row.work,
            row.system,
            f"{1000 * min(row.seconds):.1f}",
            f"{1000 * median(row.seconds):.1f}",
            "" if other is None else f"{min(row.seconds) / min(other.seconds):.2f}",
            "" if other is None else f"{median(row.seconds) / median(other.seconds):.2f}",
            f"{1000 * min(row.cpu_seconds):.1f}",
            "" if other is None else f"{min(row.cpu_seconds) / min(other.cpu_seconds):.2f}",
        )

    def render_table(self, rows: Sequence[Row]) -> str:
        """The times as a table for a terminal."""
        return terminal_table(self.title, self.headings, _NUM_WORDS, self.lines(rows))

    def render_markdown(self, rows: Sequence[Row]) -> str:
        """The section of benchmarks/RESULTS.md."""
        facts = [f"- {name}: {value}" for name, value in self._facts(rows).items()]
        return "\n".join([self.section, *markdown_table(self.headings, _NUM_WORDS, self.lines(rows)), "", *facts])

    def render_json(self, rows: Sequence[Row]) -> str:
        """Every time, with where it was taken."""
        return json.dumps({**self._facts(rows), "rows": [asdict(row) for row in rows]}, indent=2)

    def _facts(self, rows: Sequence[Row]) -> dict[str, str]:
        counts = sorted({len(row.seconds) for row in rows if not row.wrong})
        return {
            **self.facts(),
            "steps": ", ".join(f"{count} for each" for count in counts),
            "machine": machine(),
            "versions": versions(*self.packages),
        }
