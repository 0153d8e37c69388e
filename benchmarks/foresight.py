"""The planner's forecasts beside real runs: step times of all layouts of 2, 4 and 8 processes, and the memory of 12 layouts.

    python -m benchmarks.foresight
    python -m benchmarks.foresight --quick
    python -m benchmarks.foresight --markdown --output docs/foresight.png

Step times are those of processes that sleep for their products and whose links are slow, on this machine's CPU; memory is counted
as by `python -m benchmarks.memory`. Exit code 1 where, for any number of processes or for all, the rank correlation of forecast and
measured step times is below 0.9 or the layout that is chosen is more than 5 % slower than the quickest; where model states are not
those of the forecast to the byte; or where activations are off by more than 3 % in the median or 8 % at the worst.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import finish, load_ranks, make_parser, report

if TYPE_CHECKING:
    from benchmarks.foresight_table import Findings

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
    found = measure(options.quick)
    from benchmarks import foresight_table  # late, so that --help is quick

    code = finish(found, options, foresight_table, foresight_table.wrong(found), "every line holds")
    if options.output is not None:
        foresight_table.draw(found.times, options.output)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "foresight",
        "Train in every layout of 2, 4 and 8 processes that sleep and talk over slow links, and compare step times with the "
        "planner's forecasts; count what ranks store in 12 layouts of three models, and compare that. Takes about 15 minutes on "
        "2 cores, which should have nothing else to do.",
        "Exit code 1 where a forecast is not as good as the top of benchmarks/foresight.py says.",
        json="every number",
        quick="2 processes, and the memory of one model: about 2 minutes",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw forecasts against measured times into this PNG")
    return parser


def measure(quick: bool) -> Findings:
    """Forecast and measure everything; progress goes to stderr.

    Raises:
        AssertionError: a rank raised (its traceback is the message).
    """
    run_ranks = load_ranks("torch, Lightning, DeepSpeed and transformers", "deepspeed.runtime.zero.muon.muon_optimizer")
    from benchmarks.foresight_memory import CASES, MODELS, foresee, measure_on_gpu, measure_ranks
    from benchmarks.foresight_table import Findings
    from benchmarks.foresight_time import WORLDS, time_layouts
    from lightning_par.layout import parse_layout

    times = [row for world in WORLDS[: 1 if quick else None] for row in time_layouts(run_ranks, world, report)]
    memory = []
    for model in list(MODELS)[: 1 if quick else None]:
        report(f"memory: {model}")
        pairs = zip(CASES, foresee(MODELS[model], CASES), strict=True)
        by_world = sorted(pairs, key=lambda pair: parse_layout(pair[0].word).world_size)
        for world, group in groupby(by_world, lambda pair: parse_layout(pair[0].word).world_size):
            cases, foreseen = zip(*group, strict=True)
            for rows in run_ranks(measure_ranks, world, model, cases, foreseen, timeout=_TIMEOUT_SECONDS):
                memory += rows
    (peaks,) = run_ranks(measure_on_gpu, 1, timeout=_TIMEOUT_SECONDS)
    return Findings(times, memory, peaks)


if __name__ == "__main__":
    sys.exit(main())
