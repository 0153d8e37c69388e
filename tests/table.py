"""Makes the tables of docs/works.md, what works and what is refused, from what the tests run over.

    python -m tests.table                train every model of the matrix in every layout, and write both tables
    python -m tests.table tp2 tp2_sp     only these layouts; the other numbers stay
    python -m tests.table refused        only the errors

A test compares the tables with the registries, and raises every error again (`tests/test_readme.py`).
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.matrix import MATRIX
from tests.parity import check_parity
from tests.refusals import REFUSALS
from tests.zoo import ZOO

PAGE = Path(__file__).resolve().parents[1] / "docs" / "works.md"
TIMEOUT_SECONDS = 900
_EMPTY = "| model |"
Errors = dict[str, dict[str, str]]  # by layout and model, the largest relative error as it is shown


def works(errors: Mapping[str, Mapping[str, str]]) -> str:
    """The models and layouts of the matrix, each with its largest relative error."""
    rows = [["model", *(f"`{word}`" for word in MATRIX)]]
    rows += [[name, *(errors.get(word, {}).get(name, "") for word in MATRIX)] for name in ZOO]
    return _table(rows)


def refused() -> str:
    """Every refusal with the text of its error."""
    return _table([["what", "layout", "the error"], *([case.what, f"`{case.word}`", case.message()] for case in REFUSALS)])


def shown(error: float) -> str:
    """A number of the table."""
    return f"{error:.0e}" if error else "0"


def read(text: str) -> Errors:
    """The numbers in the table of what works, as the page has them."""
    lines = [line for line in section(text, "works").splitlines() if not line.startswith("|---")]
    head, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines or [_EMPTY])
    return {word.strip("`"): {row[0]: row[index] for row in rows} for index, word in enumerate(head) if index}


def section(text: str, name: str) -> str:
    """What stands between the marks of a table."""
    return _marked(name).search(text)[2]  # type: ignore[index]


def replaced(text: str, name: str, table: str) -> str:
    """The text with another table between the marks."""
    return _marked(name).sub(lambda found: found[1] + table + found[3], text)


def _marked(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}: python -m tests\.table -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def main(chosen: list[str]) -> None:
    """Measure the chosen layouts, all by default, and write the page."""
    for name in ("pytorch_lightning", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    text = PAGE.read_text()
    errors = read(text)
    for word in chosen or MATRIX:
        if word in MATRIX:
            measured = check_parity(MATRIX[word], word, timeout=TIMEOUT_SECONDS)
            errors[word] = {name: shown(error) for name, error in measured.items()}
            text = replaced(text, "works", works(errors))
    PAGE.write_text(replaced(text, "refused", refused()))


if __name__ == "__main__":
    main(sys.argv[1:])
