"""Step time from end to end: Lightning's own strategies, a loop of one's own, and lightning_par under the same Trainer.

    python -m benchmarks.trainer
    python -m benchmarks.trainer --quick
    python -m benchmarks.trainer --markdown

The same model is trained over one and two forked processes on this machine's CPU, on the same rows in every step. Losses must be
those of one process. Exit code 1 where they are not.
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
    return run_contest(_parser(), arguments, measure, "trainer_table")


def _parser() -> argparse.ArgumentParser:
    return make_parser(
        "trainer",
        "Time the steps of whole trainings over 1 and 2 processes, loader and hooks included: loops of one's own with what torch "
        "has, Lightning's single device, DDP and ModelParallelStrategy (FSDP2, DTensor), and lightning_par under the same "
        "Trainer. Takes about 10 minutes on 2 cores, which should have nothing else to do.",
        "Exit code 1 where a system computes other losses than one process.",
        json="every time",
        quick="few steps of each: about 2 minutes, and rough",
    )


def measure(effort: str) -> list[Row]:
    """Time every system; see `benchmarks.command.measure_contest`."""
    return measure_contest("trainers", effort)


if __name__ == "__main__":
    sys.exit(main())
