"""Steps of a language model on one GPU: in a plain PyTorch loop, under Lightning's Trainer, and under ours.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --quick --only recompute
    python -m benchmarks.gpu --markdown

Each row is a process of its own. Without a GPU it says so and measures nothing. Exit code 1 where a system's losses are not those
of the others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import finish, load_ranks, make_parser, report

if TYPE_CHECKING:
    from benchmarks.gpu_pace import Row

_DRIVER = Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl")  # asking torch would start CUDA, after which none can fork
_TIMEOUT_SECONDS = 300


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words after the command's name; by default those it was started with.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    if not any(path.exists() for path in _DRIVER):
        report("skipped: this machine has no NVIDIA GPU, or no driver for one")
        return 0
    rows = measure(options.quick, options.only)
    from benchmarks import gpu_table  # late, so that --help is quick
    from benchmarks.gpu_pace import differences

    return finish(rows, options, gpu_table, differences(rows), "every system trains alike")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "gpu",
        "Time the steps of a Llama of 1.2 billion parameters on one GPU, count their kernels and the time without one, and hold "
        "peak memory against the forecast: a plain PyTorch loop, Lightning's own Trainer and lightning_par, as they are, compiled, "
        "in float8, with recomputation. Takes about seven minutes on an H100.",
        "Exit code 1 where losses differ by more than the precision explains.",
        json="every number",
        quick="rows that are not compiled, and few steps of each",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this in their name, such as fp8")
    return parser


def measure(quick: bool, only: str = "") -> list[Row]:
    """Train in every way; progress goes to stderr. A way that fails has its error for a result.

    Args:
        quick, only: see ``--help``.
    """
    os.environ["LIGHTNING_PAR_TEST_DEVICE"] = "cuda"  # hides the GPU from this process, which is going to fork
    run_ranks = load_ranks("torch, Lightning and transformers, and making the model", "transformers")
    from benchmarks.gpu_pace import CASES, Row, make_decoder, measure_case

    decoder, rows = make_decoder(), []
    for case in CASES:
        if (quick and case.compiles) or only not in case.name:
            continue
        report(case.name)
        try:
            rows += run_ranks(measure_case, 1, case, decoder, 4 if quick else 20, timeout=_TIMEOUT_SECONDS)
            report(f"  {rows[-1]}")
        except AssertionError as error:
            report(str(error))
            rows.append(Row(case.system, case.what, error=str(error).strip().splitlines()[-1]))
    return rows


if __name__ == "__main__":
    sys.exit(main())
