"""What a table is made for: sizes, costs and memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lightning_par.layout import Placement, pp_of_stage
from lightning_par.pipeline.action import Kind
from lightning_par.pipeline.simulate import Costs


@dataclass(frozen=True)
class Problem:
    """One batch on the ranks of a pipeline.

    Attributes:
        costs: time of each action.
        num_ranks: ranks of the pipeline.
        num_chunks: stages on each.
        num_microbatches: pieces of the batch.
        placement: which stages are on which rank.
        most_held: activations that a rank may hold at once, each of one microbatch on one stage, from F to the end of B or W.
        splits_backward: whether backwards run as I and W.
    """

    costs: Costs
    num_ranks: int
    num_chunks: int
    num_microbatches: int
    placement: Placement
    most_held: int
    splits_backward: bool

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return self.num_ranks * self.num_chunks

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What each stage does with each microbatch, in order."""
        return ("F", "I", "W") if self.splits_backward else ("F", "B")

    @cached_property
    def rank_of(self) -> list[int]:
        """The rank of each stage."""
        return [pp_of_stage(stage, self.num_ranks, self.placement) for stage in range(self.num_stages)]

    @cached_property
    def stages_of(self) -> list[list[int]]:
        """The stages of each rank, ascending."""
        return [[stage for stage in range(self.num_stages) if self.rank_of[stage] == rank] for rank in range(self.num_ranks)]

    def transfer_seconds(self, stage: int, other: int) -> float:
        """Time of an activation or gradient between two stages."""
        return self.costs.transfer if self.rank_of[stage] != self.rank_of[other] else 0.0
