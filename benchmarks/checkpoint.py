"""Saving and loading beside raw file writes and torch.distributed.checkpoint.

    python -m benchmarks.checkpoint
    python -m benchmarks.checkpoint --quick
    python -m benchmarks.checkpoint --markdown --folder /path/on/the/disk

The model states of one run are written and read in turns by each system, by two processes. Exit code 1 where bytes are not written
exactly once, or another state is read than was written.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import finish, load_ranks, make_parser

if TYPE_CHECKING:
    from benchmarks.saving_pace import Row

_TIMEOUT_SECONDS = 900


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
    rows = measure(options.quick, options.folder)
    from benchmarks import saving_table  # late, so that --help is quick
    from benchmarks.saving_pace import differences

    return finish(rows, options, saving_table, differences(rows), "every byte of the state was written once, and read back")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "checkpoint",
        "Time saves and loads of a run's model states by lightning_par, by raw writes and reads of as many bytes, and by "
        "torch.distributed.checkpoint. Takes about 2 minutes on 2 cores and 3 GB of the disk.",
        "Exit code 1 where bytes are not written exactly once, or other states are read than were written.",
        json="every time",
        quick="a small model, few times: rough",
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write (default: the folder for temporary files)")
    return parser


def measure(quick: bool, folder: Path | None) -> list[Row]:
    """Time every system; progress goes to stderr.

    Raises:
        AssertionError: a rank raised (its traceback is the message).
    """
    run_ranks = load_ranks("torch, Lightning and DeepSpeed", "deepspeed.runtime.zero.muon.muon_optimizer")
    from benchmarks.saving_pace import NUM_RANKS, QUICK, Effort, measure_rank

    with tempfile.TemporaryDirectory(dir=folder) as place:
        effort = QUICK if quick else Effort()
        rows: list[Row] = run_ranks(measure_rank, NUM_RANKS, effort, Path(place), timeout=_TIMEOUT_SECONDS)[0]
    return rows


if __name__ == "__main__":
    sys.exit(main())
