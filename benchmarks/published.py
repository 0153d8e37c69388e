"""The planner's forecasts of runs that others have published.

    python -m benchmarks.published
    python -m benchmarks.published --quick
    python -m benchmarks.published --markdown

One process, no device, no download: models are built without memory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.command import finish, make_parser, report

_QUICK = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words after the command's name; by default those it was started with.

    Returns:
        The exit code.
    """
    options = make_parser(
        "published",
        "Forecast the step times of published runs from their models and layouts, and print them beside what was measured. Takes "
        "about 10 minutes, most of it for models of 100 layers.",
        "Exit code 1 where a forecast is off by more than half.",
        json="every forecast",
        quick="the smallest model alone: about 1 minute",
    ).parse_args(arguments)
    report("importing torch, Lightning and transformers")
    from benchmarks import published_table  # late, so that --help is quick
    from benchmarks.published_forecast import forecast_runs
    from benchmarks.published_runs import published_runs

    rows = forecast_runs(published_runs()[: _QUICK if options.quick else None])
    wrong = [f"{row.run.name}: off by {row.error:+.0%}" for row in rows if abs(row.error) > 0.5]
    return finish(rows, options, published_table, wrong, "every forecast is within half of what was measured")


if __name__ == "__main__":
    sys.exit(main())
