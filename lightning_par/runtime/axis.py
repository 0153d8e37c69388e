"""One direction of the mesh as a rank sees it: how many ranks there are, which one this is, and how they talk.

`Axis` is the seam. `GroupAxis` talks over a process group; `LocalAxis` has the same sizes but talks to nobody, so that
an installed module can be run on fake tensors in one process (shapes are right, values mean nothing).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter

import torch
import torch.distributed as dist


class Axis(ABC):
    """A mesh direction seen from one rank.

    Attributes:
        name: ``tp``, ``pp`` or ``dp``.
        size: ranks on it.
        coordinate: position of this rank, from 0.
        gathers: how often each function had to be given gathered tensors, because it has no rule for sharded ones.
    """

    def __init__(self, name: str, size: int, coordinate: int) -> None:
        self.name, self.size, self.coordinate = name, size, coordinate
        self.gathers: Counter[str] = Counter()

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        """Reduce ``tensor`` in place over the axis; ``op`` is ``sum`` or ``max``. Collective over the axis."""

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all coordinates, in order; shapes must be equal. Collective over the axis."""


class LocalAxis(Axis):
    """An axis of one process that plays one of ``size`` ranks and talks to nobody."""

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        """Leave ``tensor`` as it is."""

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Repeat ``tensor``."""
        return [tensor] * self.size


class GroupAxis(Axis):
    """An axis over a process group. An axis of size 1 never communicates.

    Attributes:
        group: the process group.
        ranks: global ranks on it, by coordinate.
    """

    def __init__(self, name: str, group: dist.ProcessGroup, ranks: list[int], coordinate: int) -> None:
        super().__init__(name, len(ranks), coordinate)
        self.group, self.ranks = group, ranks

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=self.group)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if self.size == 1:
            return [tensor]
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=self.group)
        return parts
