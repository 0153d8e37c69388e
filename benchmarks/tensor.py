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

from benchmarks.command import load_ranks, make_parser, run_contest

if TYPE_CHECKING:
    from benchmarks.contest import Row

_TIMEOUT_SECONDS = 1800


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
    """Time every system; progress goes to stderr.

    Args:
        effort: a word of `benchmarks.contest.EFFORTS`.

    Raises:
        AssertionError: a rank raised (its traceback is the message).
    """
    run_ranks = load_ranks("torch, transformers, Lightning and DeepSpeed", "deepspeed")
    from benchmarks.contest import EFFORTS, measure_rank
    from benchmarks.shards import NUM_RANKS, SYSTEMS, train_alone

    rows: list[Row] = run_ranks(measure_rank, NUM_RANKS, SYSTEMS, train_alone, EFFORTS[effort], timeout=_TIMEOUT_SECONDS)[0]
    return rows


if __name__ == "__main__":
    sys.exit(main())
