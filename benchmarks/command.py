"""What the commands of all benchmarks have in common: their options, how they begin and how they end.

Nothing heavy is imported here, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.contest import Row

_CONTEST_SECONDS = 1800  # in which all systems of so many ranks must be done


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


def load_ranks(packages: str, heavy: str) -> Any:
    """Import what is slow to import, and say so; `tests.ranks.run_ranks`.

    Args:
        packages: what is imported, in words.
        heavy: a module that every forked rank would import for itself if it were not imported here.
    """
    report(f"importing {packages}")
    from tests.ranks import run_ranks  # first: what the environment must say before torch is imported is said there

    import_module(heavy)
    return run_ranks


def run_contest(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, measure: Callable[[str], list[Row]], table: str
) -> int:
    """Run a command that times systems which do the same work.

    Args:
        parser: of the command.
        arguments: words after its name; None for those it was started with.
        measure: takes a word of `benchmarks.contest.EFFORTS`.
        table: name of the module whose ``TABLE`` shows the rows.

    Returns:
        The exit code: 1 where a system computes something else than one process.

    Raises:
        AssertionError: a rank raised; its traceback is the message.
    """
    options = parser.parse_args(arguments)
    rows = measure("quick" if options.quick else "full")
    from benchmarks.contest import differences  # late, so that --help is quick

    shown = import_module(f"benchmarks.{table}").TABLE
    return finish(rows, options, shown, differences(rows), "every system computes what one process does")


def measure_contest(systems: str, effort: str) -> list[Row]:
    """Time systems that do the same work, in forked ranks; progress goes to stderr.

    Args:
        systems: name of the module that has them, by how many ranks they are of, as ``SYSTEMS``, and what one process
            computes as ``train_alone``.
        effort: a word of `benchmarks.contest.EFFORTS`.

    Raises:
        AssertionError: a rank raised; its traceback is the message.
    """
    run_ranks = load_ranks("torch, Lightning and DeepSpeed", "deepspeed.runtime.zero.muon.muon_optimizer")
    from benchmarks.contest import EFFORTS, measure_rank

    module, rows = import_module(f"benchmarks.{systems}"), list[Any]()
    for num_ranks, its in module.SYSTEMS.items():
        rows += run_ranks(measure_rank, num_ranks, its, module.train_alone, EFFORTS[effort], timeout=_CONTEST_SECONDS)[0]
    return rows


def finish(rows: Any, options: argparse.Namespace, table: Any, wrong: Sequence[str], otherwise: str) -> int:
    """Print what was measured in the form that was asked for, and say on stderr whether it is right.

    Args:
        rows: what was measured, as ``table`` takes it.
        options: of the command.
        table: has ``render_json``, ``render_markdown`` and ``render_table``.
        wrong: what is not as it should be.
        otherwise: what can be said where nothing is wrong.

    Returns:
        The exit code: 1 where something is wrong.
    """
    form = "json" if options.json else "markdown" if options.markdown else "table"
    print(getattr(table, f"render_{form}")(rows))
    report("\n".join(wrong) or otherwise)
    return 1 if wrong else 0


def report(progress: str) -> None:
    """Say something on stderr."""
    print(progress, file=sys.stderr, flush=True)
