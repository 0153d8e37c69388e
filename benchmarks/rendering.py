"""Lines of a result as a table for a terminal and as one for a page."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

Lines = Sequence[tuple[str, ...]]


def terminal_table(title: str, headings: Sequence[str], num_words: int, lines: Lines) -> str:
    """A table of 132 columns; a rule where the first column changes.

    Args:
        title: above it.
        headings: of the columns; the first ``num_words`` hold words, the others numbers.
        num_words: how many.
        lines: what stands under them.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < num_words else "right", no_wrap=index < num_words)
    first = ""
    for line in lines:
        if line[0] != first:
            table.add_section()
        first = line[0]
        table.add_row(*line)
    output = StringIO()
    Console(file=output, width=132).print(table)
    return output.getvalue().rstrip()


def markdown_table(headings: Sequence[str], num_words: int, lines: Lines) -> list[str]:
    """The rows of a table in Markdown, as `terminal_table` takes them."""
    rule = tuple("---" if index < num_words else "--:" for index in range(len(headings)))
    return [f"| {' | '.join(line)} |" for line in (tuple(headings), rule, *lines)]
