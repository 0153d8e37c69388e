"""Axes for tests of one group."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist

from lightning_par.runtime.axis import GroupAxis, Wait


class CountingAxis(GroupAxis):
    """A tp axis over the whole world that counts its collectives."""

    def __init__(self) -> None:
        group = dist.group.WORLD
        assert group is not None
        super().__init__("tp", group, list(range(dist.get_world_size())), dist.get_rank())
        self.calls: Counter[str] = Counter()

    def begin_all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> Wait:
        self.calls["all_reduce"] += 1
        return super().begin_all_reduce(tensor, op)

    def begin_reduce_scatter(self, parts: torch.Tensor) -> tuple[torch.Tensor, Wait]:
        self.calls["reduce_scatter"] += 1
        return super().begin_reduce_scatter(parts)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.calls["all_gather"] += 1
        return super().all_gather(tensor)


def tp_axis() -> CountingAxis:
    """A tp axis over all ranks of the test."""
    return CountingAxis()
