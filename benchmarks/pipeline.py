"""Step time, overhead and host time of pipeline schedules, of this and other systems.

    python -m benchmarks.pipeline
    python -m benchmarks.pipeline --quick
    python -m benchmarks.pipeline --markdown

The same chain of blocks is run by each system over forked processes on this machine's CPU. Losses and gradients must be those of
one process. Exit code 1 where they are not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.command import finish, load_ranks, make_parser

if TYPE_CHECKING:
    from benchmarks.pace import Row

_TIMEOUT_SECONDS = 1800


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
    rows = measure("quick" if options.quick else "full")
    from benchmarks import pace_table  # late, so that --help is quick
    from benchmarks.pace import differences

    return finish(rows, options, pace_table, differences(rows), "every system computes what one process does")


def _parser() -> argparse.ArgumentParser:
    return make_parser(
        "pipeline",
        "Time the steps of pipelines over 4 ranks whose stages sleep, and whose stages do nothing: every schedule of "
        "lightning_par, torch.distributed.pipelining and DeepSpeed's PipelineEngine on the same chain. Takes about 8 minutes on 2 "
        "cores, which should have nothing else to do.",
        "Exit code 1 where a system computes another loss or other gradients than one process.",
        json="every time",
        quick="few steps of each: about a minute and a half, and rough",
    )


def measure(effort: str) -> list[Row]:
    """Time every system; progress goes to stderr.

    Args:
        effort: a word of `benchmarks.pace.EFFORTS`.

    Raises:
        AssertionError: a rank raised (its traceback is the message).
    """
    run_ranks = load_ranks("torch, Lightning and DeepSpeed", "deepspeed")
    from benchmarks.napping import NUM_RANKS
    from benchmarks.pace import EFFORTS, measure_rank

    rows: list[Row] = run_ranks(measure_rank, NUM_RANKS, EFFORTS[effort], timeout=_TIMEOUT_SECONDS)[0]
    return rows


if __name__ == "__main__":
    sys.exit(main())
