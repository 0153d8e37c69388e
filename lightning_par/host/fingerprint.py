"""Whether the ranks that share one copy of the model read the same batch, by exchanging a few bytes of it.

Ranks of one replica that drift apart (an unsharded sampler, transforms seeded by rank) train on mixed samples without an
error: every shape still fits.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lightning_par.errors import ReplicaError
from lightning_par.runtime.axis import GroupAxis
from lightning_par.runtime.nested import children, path_to

Leaf = tuple[str, tuple[int, ...], str, tuple[int, ...]]
_INTEGER_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def fingerprint(batch: Any) -> list[Leaf]:
    """What identifies a batch in a few bytes: (path, shape, dtype, checksum) of every tensor, array and plain value.

    Objects of other types are left out.
    """
    return _fingerprint(batch, "batch")


def check_same_batch(batch: Any, replica: GroupAxis, where: str) -> None:
    """Check that all ranks of a replica got the same batch. Collective over ``replica``.

    Args:
        batch: this rank's batch.
        replica: the ranks that must read the same data: tp x pp of one replica.
        where: what was read and by whom, as in ``training batch 0 of dp 1``.

    Raises:
        ReplicaError: some batch differs; on every rank of ``replica``, with the same text.
    """
    if replica.size == 1:
        return
    every: list[Any] = [None] * replica.size
    dist.all_gather_object(every, fingerprint(batch), group=replica.group)
    different = [i for i in range(replica.size) if every[i] != every[0]]
    if different:
        ranks = ", ".join(str(replica.ranks[i]) for i in different)
        plural = "rank" if len(different) == 1 else "ranks"
        what = _difference(every[0], every[different[0]], replica.ranks[0], replica.ranks[different[0]])
        raise ReplicaError(
            f"{where}: {plural} {ranks} got another batch than rank {replica.ranks[0]}: {what}. All {replica.size} ranks of a "
            "replica share one copy of the model and must read the same samples. Leave use_distributed_sampler=True, or shard "
            "your sampler or iterable dataset by the strategy's dp_rank and dp_size (never by RANK), and seed random transforms "
            "by the sample's index"
        )


def _fingerprint(node: Any, path: str) -> list[Leaf]:
    if isinstance(node, (torch.Tensor, np.ndarray)):
        return [(path, tuple(node.shape), str(node.dtype), _checksum(node))]
    if _is_plain(node):
        return [(path, (), type(node).__name__, (zlib.crc32(repr(node).encode()),))]
    return [leaf for key, child in children(node) or () for leaf in _fingerprint(child, path_to(path, node, key))]


def _is_plain(node: Any) -> bool:
    """Whether ``repr`` says all about ``node``: the same on two ranks exactly when the values are."""
    if isinstance(node, (list, tuple)):
        return all(_is_plain(item) for item in node)
    return node is None or isinstance(node, (str, bytes, bool, int, float))


def _checksum(values: torch.Tensor | np.ndarray) -> tuple[int, ...]:
    """Of a tensor the sum and the position-weighted sum of its elements' bits, on its own device; of an array its CRC.

    The sums are exact: integers wrap around modulo 2**64, in whatever order a device adds them.
    """
    if isinstance(values, np.ndarray):
        return (zlib.crc32(values.tobytes()),) if values.dtype != object else ()
    flat = values.detach().contiguous().reshape(-1)
    bits = flat.view(_INTEGER_OF_BYTES.get(flat.element_size(), torch.int64)).long()
    positions = torch.arange(1, bits.numel() + 1, device=bits.device)
    return tuple(torch.stack([bits.sum(), (bits * positions).sum()]).tolist())


def _difference(one: list[Leaf], other: list[Leaf], one_rank: int, other_rank: int) -> str:
    """The first thing in which two fingerprints differ, in words."""
    left, right = {leaf[0]: leaf[1:] for leaf in one}, {leaf[0]: leaf[1:] for leaf in other}
    for path in {**left, **right}:
        if path not in left or path not in right:
            return f"{path} is missing on rank {other_rank if path in left else one_rank}"
        for index, name in enumerate(("shape", "dtype")):
            if left[path][index] != right[path][index]:
                return f"{path} has {name} {left[path][index]} on rank {one_rank} and {right[path][index]} on rank {other_rank}"
        if left[path] != right[path]:
            shape = f" of shape {left[path][0]}" if left[path][0] else ""
            return f"{path}{shape} has other values"
    return "the same things in another order"
