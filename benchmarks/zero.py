"""Step time of ZeRO 0 to 3 beside DeepSpeed's own loop, DDP and FSDP2.

    python -m benchmarks.zero
    python -m benchmarks.zero --quick
    python -m benchmarks.zero --markdown

The same model is trained by each system over forked processes on this machine's CPU. Losses must be those of one process. Exit
code 1 where they are not.
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
    return run_contest(_parser(), arguments, measure, "replica_table")


def _parser() -> argparse.ArgumentParser:
    return make_parser(
        "zero",
        "Time the steps of two replicas: ZeRO 0 to 3 of lightning_par and of DeepSpeed's own loop, "
        "DistributedDataParallel and fully_shard, on the same model and data. Takes about 6 minutes on 2 cores, which should have "
        "nothing else to do.",
        "Exit code 1 where a system computes other losses than one process.",
        json="every time",
        quick="few steps of each: about 1 minute, and rough",
    )


def measure(effort: str) -> list[Row]:
    """Time every system; see `benchmarks.command.measure_contest`."""
    return measure_contest("replicas", effort)


if __name__ == "__main__":
    sys.exit(main())
