"""What a schedule is, besides its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_par.layout import Placement
from lightning_par.pipeline.action import Table


@dataclass(frozen=True)
class Schedule:
    """One way to run the stages of a pipeline.

    Attributes:
        name: what the user types.
        build: the table of (ranks, stages on each rank, microbatches), for any number of microbatches.
        least_chunks: fewest stages on each rank.
        most_chunks: most of them; ``None`` for any number.
        placement: which stages are on which rank, see `lightning_par.layout.pp_of_stage`.
        splits_backward: whether it runs I and W in place of B.
        fills_ranks: whether it is made for at least as many microbatches as there are ranks.
    """

    name: str
    build: Callable[[int, int, int], Table]
    least_chunks: int = 1
    most_chunks: int | None = 1
    placement: Placement = "loop"
    splits_backward: bool = False
    fills_ranks: bool = False

    def has_chunks(self, num_chunks: int) -> bool:
        """Whether it can have ``num_chunks`` stages on each rank."""
        return self.least_chunks <= num_chunks and (self.most_chunks is None or num_chunks <= self.most_chunks)

    def least_microbatches(self, num_ranks: int) -> int:
        """How many microbatches a configuration must have; a ragged last batch may have fewer."""
        return num_ranks if self.fills_ranks else 1
