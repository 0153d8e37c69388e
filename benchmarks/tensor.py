"""Step time of tensor parallelism beside DTensor and DeepSpeed AutoTP.

    python -m benchmarks.tensor
    python -m benchmarks.tensor --quick
    python -m benchmarks.tensor --markdown

The same Llama is trained by each system over forked processes on this machine's CPU. Losses must be those of one process. Exit
code 1 where they are not. What each communicates is counted by `python -m benchmarks.communication`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.command import make_parser, measure_contest, run_contest

if TYPE_CHECKING:
    from benchmarks.contest import Row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these words, by default those it was started with; see `benchmarks.command.run_contest`."""
    return run_contest(_parser(), arguments, measure, "shard_table")


def _parser() -> argparse.ArgumentParser:
    return make_parser(
        "tensor",
        "Time the steps of tensor parallelism over 2 ranks: lightning_par, DTensor and DeepSpeed AutoTP on the same Llama and "
        "data, with sequence parallelism too where a system has it. Takes about 4 minutes on 2 cores, which should have nothing "
        "else to do.",
        "Exit code 1 where a system computes other losses than one process.",
        json="every time",
        quick="few steps of each: about 1 minute, and rough",
    )


def measure(effort: str) -> list[Row]:
    """Time every system; see `benchmarks.command.measure_contest`."""
    return measure_contest("shards", effort)


if __name__ == "__main__":
    sys.exit(main())
