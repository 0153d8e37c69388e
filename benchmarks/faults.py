"""Runs that lose a rank: do all ranks end, are the checkpoints whole, does the run go on to the same end?

    python -m benchmarks.faults
    python -m benchmarks.faults --runs 5
    python -m benchmarks.faults --markdown

In each run a random rank is killed by SIGKILL at a random moment between its start and its end: while it imports, loads, computes,
saves (every third step) or validates. Exit code 1 where one hangs, leaves a checkpoint that cannot be read, does not go on, or
learns something else than the run that nobody killed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import finish, make_parser, report

if TYPE_CHECKING:
    from benchmarks.fault import Outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words after the command's name; by default those it was started with.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    outcomes = measure(options.runs, options.seed)
    from benchmarks import fault_table  # late, so that --help is quick

    return finish(outcomes, options, fault_table, fault_table.faults(outcomes), "every run has survived")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "faults",
        "Kill a random rank of a run at a random moment, again and again. A run takes about 30 seconds on 2 cores.",
        "Exit code 1 where a run hangs for more than 30 s, leaves an unreadable checkpoint, does not resume, or learns something "
        "else than the run that nobody killed.",
        json="every run",
    )
    parser.add_argument("--runs", type=int, default=50, help="how many (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws of ranks and moments (0)")
    return parser


def measure(runs: int, seed: int) -> list[Outcome]:
    """Kill a rank in so many runs; progress goes to stderr."""
    report("importing torch")
    from benchmarks.fault import draw_kills, run_killed, run_whole

    outcomes = []
    with tempfile.TemporaryDirectory(prefix="lightning_par-faults-") as name:
        report("the run that nobody kills")
        whole = run_whole(Path(name) / "whole")
        for index, kill in enumerate(draw_kills(seed, runs)):
            outcome = run_killed(Path(name) / str(index), kill, whole)
            outcomes.append(outcome)
            end = "HANGS" if outcome.end_seconds is None else f"all ended in {outcome.end_seconds:.1f} s"
            is_good = outcome.has_resumed and outcome.is_equal and not outcome.unreadable
            report(
                f"{index + 1:3d} of {runs}: rank {kill.rank} killed at step {kill.step:2d}, {outcome.doing}: {end}, "
                f"{'the same end' if is_good else 'WRONG'}"
            )
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
