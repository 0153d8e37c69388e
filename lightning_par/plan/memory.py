"""What a rank stores, as a part of the plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankMemory:
    """Bytes on each rank of a pp coordinate.

    Attributes:
        parameters: as the optimizer and the forward have them.
        gradients: before they are reduced.
        states: of the optimizer, master weights included.
        activations: the most that is stored between two actions of the schedule: for backwards to come, or received, or noted.
        working: what an action has at its peak besides: what operations give each other, and a block that is computed again.
        gathered: the most that ZeRO-3 has of whole parameters at once.
    """

    parameters: int
    gradients: int
    states: int
    activations: int
    working: int
    gathered: int = 0

    @property
    def total(self) -> int:
        """All of it at once."""
        return self.parameters + self.gradients + self.states + self.activations + self.working + self.gathered
