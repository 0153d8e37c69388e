"""All comparisons of step times with peers in one run, gathered in one table; on a page, the table of each follows.

    python -m benchmarks.all
    python -m benchmarks.all --quick
    python -m benchmarks.all --markdown --output docs/peers.png

Exit code 1 where a system computes something else than one process, or where the quickest and the median step of lightning_par both
are more than 5 % slower than a peer's that does the same work, and `benchmarks.peers.REASONS` does not say why.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.command import finish, make_parser, report

BENCHMARKS = ("tensor", "zero", "trainer", "pipeline")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words after the command's name; by default those it was started with.

    Returns:
        The exit code.

    Raises:
        AssertionError: a rank raised; its traceback is the message.
    """
    options = _parser().parse_args(arguments)
    measured = measure("quick" if options.quick else "brief")
    from benchmarks import peers_table  # late, so that --help is quick
    from benchmarks.contest import differences
    from benchmarks.peers import losses, matches

    rows = {name: [row.in_contest() for row in its] for name, its in measured.items()}
    found = [match for name, its in rows.items() for match in matches(name, its)]
    wrong = [f"{name}: {words}" for name, its in rows.items() for words in differences(its)] + losses(found)
    if options.output is not None:
        peers_table.draw(found, options.output)
    code = finish(found, options, peers_table, wrong, "at or under every peer, or the table says why not")
    if options.markdown:
        print("", *peers_table.sections(measured), sep="\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "all",
        f"Run the benchmarks {', '.join(BENCHMARKS)} one after the other, each shorter than by itself, and compare lightning_par "
        "with each peer that does the same work. Takes less than 20 minutes on 2 cores, which should have nothing else to do.",
        "Exit code 1 where a system computes something else than one process, or where lightning_par is slower than a peer by more "
        "than noise for no reason that is known.",
        json="every time",
        quick="few steps of each: about 7 minutes, and rough",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw the ratios into this PNG")
    return parser


def measure(effort: str) -> dict[str, list[Any]]:
    """The rows of each benchmark, as it gives them; progress goes to stderr.

    Args:
        effort: a word of ``EFFORTS``.

    Raises:
        AssertionError: a rank raised (its traceback is the message).
    """
    rows, begin = {}, time.monotonic()
    for number, name in enumerate(BENCHMARKS, start=1):
        report(f"{name}, {number} of {len(BENCHMARKS)}, after {(time.monotonic() - begin) / 60:.1f} minutes")
        rows[name] = import_module(f"benchmarks.{name}").measure(effort)
    return rows


if __name__ == "__main__":
    sys.exit(main())
