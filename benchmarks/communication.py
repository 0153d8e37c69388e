"""Collectives and bytes of tensor parallelism, per decoder layer and microbatch, of this and other systems.

    python -m benchmarks.communication
    python -m benchmarks.communication --json
    python -m benchmarks.communication --markdown

The same transformers Llama is split by each system over forked processes on this machine's CPU. Losses and gradients must be
those of one process. Exit code 1 where lightning_par differs from the formula.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.command import finish, load_ranks, make_parser, report

if TYPE_CHECKING:
    from benchmarks.traffic import Row

SIZES = (2, 4)
_TIMEOUT_SECONDS = 300


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words after the command's name; by default those it was started with.

    Returns:
        The exit code.

    Raises:
        AssertionError: as `measure`.
    """
    options = _parser().parse_args(arguments)
    rows = measure()
    from benchmarks import traffic_table  # late, so that --help is quick
    from benchmarks.traffic import differences

    return finish(rows, options, traffic_table, differences(rows), "lightning_par equals the formula")


def _parser() -> argparse.ArgumentParser:
    return make_parser(
        "communication",
        "Count the collectives of tensor parallelism, and the bytes that one rank sends, per decoder layer and "
        "microbatch: lightning_par, DTensor and DeepSpeed AutoTP on the same Llama. Takes about a minute on 2 cores.",
        "Exit code 1 where lightning_par differs from the formula of Megatron.",
        json="every count",
    )


def measure() -> list[Row]:
    """Count every system at every size; progress goes to stderr.

    Raises:
        AssertionError: a rank raised (its traceback is the message), or ranks differ.
    """
    run_ranks = load_ranks("torch, transformers, Lightning and DeepSpeed", "deepspeed")
    from benchmarks.llama import HEADS
    from benchmarks.systems import SYSTEMS
    from benchmarks.traffic import measure_rank

    rows: list[Row] = []
    for tp in SIZES:
        first, *others = run_ranks(measure_rank, tp, SYSTEMS, (HEADS, HEADS // 2), report, timeout=_TIMEOUT_SECONDS)
        assert all(other == first for other in others), f"the ranks of tp{tp} communicate differently"
        rows += first
    return rows


if __name__ == "__main__":
    sys.exit(main())
