"""What the commands of all benchmarks have in common: their options, and how they end.

Nothing heavy is imported here, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def make_parser(name: str, description: str, epilog: str, json: str, quick: str | None = None) -> argparse.ArgumentParser:
    """The parser of ``python -m benchmarks.NAME``.

    Args:
        name: of the module.
        description: what it measures, and how long that takes.
        epilog: when the exit code is 1.
        json: what is printed as JSON.
        quick: what a quick run is like; None where there is none.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description, epilog=epilog)
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help=quick)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help=f"print {json} as JSON")
    form.add_argument("--markdown", action="store_true", help="print the section of benchmarks/RESULTS.md")
    return parser


def print_rows(rows: Sequence[Any], options: argparse.Namespace, table: ModuleType) -> None:
    """Print what was measured in the form that was asked for.

    Args:
        rows: what was measured.
        options: of the command.
        table: has ``render_json``, ``render_markdown`` and ``render_table``.
    """
    form = "json" if options.json else "markdown" if options.markdown else "table"
    print(getattr(table, f"render_{form}")(rows))


def conclude(wrong: Sequence[str], otherwise: str) -> int:
    """The exit code, after what is wrong, or what can be said where nothing is, has been said on stderr."""
    report("\n".join(wrong) or otherwise)
    return 1 if wrong else 0


def report(progress: str) -> None:
    """Say something on stderr."""
    print(progress, file=sys.stderr, flush=True)
