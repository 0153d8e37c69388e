"""Which samples a replica reads, so that all replicas together read the same for each step in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DistributedSampler

_AT_ONCE = 1 << 16  # indices that are Python's numbers at the same time


def replica_of(trainer: Any) -> tuple[int, int]:
    """Which replica this rank belongs to, and how many there are.

    Args:
        trainer: of any strategy; None for a process alone.
    """
    shards = None if trainer is None else trainer.distributed_sampler_kwargs
    return (0, 1) if shards is None else (shards["rank"], shards["num_replicas"])


class Order(DistributedSampler[Any]):
    """Replica r of d reads samples r, r + d, r + 2d, ... of an order that follows from seed and epoch alone.

    So batch k of all replicas together is samples k x B to (k + 1) x B of that order, with B the batch size times d. Lightning's
    own way has that too, but with one replica, which it leaves to a RandomSampler. It leaves a DistributedSampler as it is.

    At the end up to d - 1 samples are left out, where torch's would give some twice.

    Args:
        dataset: what is read.
        trainer: says how many replicas there are.
        shuffle: whether in random order, another one in each epoch.
        seed: of the order.
    """

    def __init__(self, dataset: Any, trainer: Any, shuffle: bool, seed: int = 0) -> None:
        rank, size = replica_of(trainer)
        super().__init__(dataset, size, rank, shuffle, seed, drop_last=True)

    def __iter__(self) -> Iterator[int]:
        number = len(self.dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(number, generator=generator) if self.shuffle else torch.arange(number)
        own = order[self.rank : len(self) * self.num_replicas : self.num_replicas]
        for part in own.split(_AT_ONCE):  # a list of all would be 40 times as large
            yield from part.tolist()

    def __len__(self) -> int:
        return len(self.dataset) // self.num_replicas  # type: ignore[arg-type]
