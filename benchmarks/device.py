"""Steps of a language model on one GPU: under Lightning's own Trainer and under ours, and what our options change.

    python -m benchmarks.device
    python -m benchmarks.device --quick
    python -m benchmarks.device --markdown

Each row is a process of its own. Needs a GPU; exit code 1 where a system's losses are not those of the others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.command import conclude, make_parser, print_rows, report

if TYPE_CHECKING:
    from benchmarks.device_pace import Row

_TIMEOUT_SECONDS = 300


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words after the command's name; by default those it was started with.

    Returns:
        The exit code.

    Raises:
        AssertionError: a row raised; its traceback is the message.
    """
    options = _parser().parse_args(arguments)
    report("importing torch, Lightning and transformers, and making the model")
    os.environ["LIGHTNING_PAR_TEST_DEVICE"] = "cuda"
    import tests.ranks  # noqa: F401  # isort: skip  # first: it hides the GPU from this process, which is going to fork

    from benchmarks import device_table  # late, so that --help is quick
    from benchmarks.device_pace import differences

    rows = measure(options.quick)
    print_rows(rows, options, device_table)
    return conclude(differences(rows), "every system trains alike")


def _parser() -> argparse.ArgumentParser:
    return make_parser(
        "device",
        "Time the steps of a decoder of 0.7 billion parameters on one GPU, and its peak memory beside the forecast: Lightning's "
        "own Trainer and lightning_par, plain, compiled, in float8, with recomputation. Takes about five minutes on an H100.",
        "Exit code 1 where losses differ by more than the precision explains.",
        json="every number",
        quick="rows that are not compiled, and few steps of each",
    )


def measure(quick: bool) -> list[Row]:
    """Train in every way; progress goes to stderr. A way that fails has its error for a result.

    Args:
        quick: see ``--help``.
    """
    from benchmarks.device_pace import CASES, Row, make_decoder, measure_case
    from tests.ranks import run_ranks

    decoder, rows = make_decoder(), []
    for case in CASES:
        if quick and case.compiles:
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
