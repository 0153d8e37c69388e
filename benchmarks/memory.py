"""Bytes that every rank stores, measured and by the forecast, in eight layouts.

    python -m benchmarks.memory
    python -m benchmarks.memory --json
    python -m benchmarks.memory --markdown --png docs/memory.png

The demo's model is trained over forked processes on this machine's CPU. Exit code 1 where parameters, gradients or optimizer states
are not those of the forecast to the byte, or activations are off by more than 3 %.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import finish, load_ranks, make_parser, report

if TYPE_CHECKING:
    from benchmarks.storage import Row

_TIMEOUT_SECONDS = 300


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
    rows = measure()
    from benchmarks import storage_table  # late, so that --help is quick
    from benchmarks.storage import differences

    code = finish(rows, options, storage_table, differences(rows), "every rank stores what the forecast says")
    if options.png is not None:
        storage_table.draw(rows, options.png)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "memory",
        "Count the bytes of parameters, gradients, optimizer states and activations on every rank of eight layouts, "
        "and compare them with the forecast. Takes about two minutes on 2 cores.",
        "Exit code 1 where model states are not exact, or activations off by more than 3 %.",
        json="every number",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the bars into this file")
    return parser


def measure() -> list[Row]:
    """Train in every layout and count; progress goes to stderr.

    Raises:
        AssertionError: a rank raised (its traceback is the message).
    """
    run_ranks = load_ranks("torch, Lightning and DeepSpeed", "deepspeed.runtime.zero.muon.muon_optimizer")
    from benchmarks.storage import CASES, measure_rank
    from lightning_par.layout import parse_layout

    rows: list[Row] = []
    for case in CASES:
        report(case.name)
        rows += run_ranks(measure_rank, parse_layout(case.word).world_size, case, timeout=_TIMEOUT_SECONDS)
    return rows


if __name__ == "__main__":
    sys.exit(main())
