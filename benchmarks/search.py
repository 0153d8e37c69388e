"""How long the planner takes to take a model apart, and to search all layouts of a cluster for it.

    python -m benchmarks.search
    python -m benchmarks.search --quick
    python -m benchmarks.search --markdown

One process, no device, no download: models are built without memory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.command import finish, make_parser, report

_MOST_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words after the command's name; by default those it was started with.

    Returns:
        The exit code.
    """
    options = make_parser(
        "search",
        "Time the search of lightning-par plan: models of 1.3 to 405 billion parameters on 32 to 16,384 H100. Takes a few minutes.",
        f"Exit code 1 where a search takes {_MOST_SECONDS:g} second or longer.",
        json="every search",
        quick="the smallest model on the fewest devices alone: about 20 seconds",
    ).parse_args(arguments)
    report("importing torch, Lightning and transformers")
    from benchmarks import search_table  # late, so that --help is quick
    from benchmarks.search_pace import MODELS, SIZES, time_searches

    rows = time_searches(MODELS[:1], SIZES[:1]) if options.quick else time_searches(MODELS, SIZES)
    slow = [
        f"{row.model} on {row.num_devices:,} devices: {row.search_seconds:.2f} s"
        for row in rows
        if row.search_seconds >= _MOST_SECONDS
    ]
    return finish(rows, options, search_table, slow, f"every search takes less than {_MOST_SECONDS:g} second")


if __name__ == "__main__":
    sys.exit(main())
