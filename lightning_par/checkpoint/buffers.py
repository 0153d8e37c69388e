"""Buffers: whole tensors, equal on most ranks that have them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_par.checkpoint.index import checksum_of
from lightning_par.checkpoint.load import Checkpoint
from lightning_par.checkpoint.shard_file import bytes_of
from lightning_par.checkpoint.share import Share, add_buffer
from lightning_par.runtime.mesh import Mesh
from lightning_par.zero.held import WEIGHT


def add_buffers(share: Share, buffers: Mapping[str, Tensor], mesh: Mesh) -> None:
    """Add this rank's share of the buffers. Collective over the world.

    The first rank that has one writes it. Where a replica has another value, as the statistics of a normalisation over its own
    batches, the first rank of that replica writes it too, as ``replica 1``.

    Args:
        share: to add to.
        buffers: those that are saved, by name.
        mesh: this rank's axes.
    """
    own = {name: checksum_of(bytes_of(buffer.detach().cpu().contiguous())) for name, buffer in buffers.items()}
    every = [own]
    if mesh.world.size > 1:
        every = [{} for _ in range(mesh.world.size)]
        dist.all_gather_object(every, own, group=mesh.world.group)
    for name, buffer in buffers.items():
        holders = [rank for rank, found in enumerate(every) if name in found]
        dps = {rank: mesh.layout.coordinate_of(rank).dp for rank in holders}
        first_here = next(rank for rank in holders if dps[rank] == mesh.coordinate.dp)
        if mesh.rank == holders[0]:
            add_buffer(share, name, WEIGHT, buffer)
        elif mesh.rank == first_here and own[name] != every[holders[0]][name]:
            add_buffer(share, name, _of_replica(mesh.coordinate.dp), buffer)


@torch.no_grad()
def read_buffers(checkpoint: Checkpoint, buffers: Mapping[str, Tensor], replica: int) -> None:
    """Overwrite buffers with those of a checkpoint; one that it does not have stays as it is.

    Args:
        checkpoint: the checkpoint.
        buffers: by name.
        replica: this rank's dp coordinate.
    """
    for name, buffer in buffers.items():
        entry = checkpoint.index.entries.get(name)
        if entry is not None:
            own = _of_replica(replica)
            buffer.copy_(checkpoint.read_whole(name, own if own in entry.values else WEIGHT).view(buffer.shape))


def _of_replica(replica: int) -> str:
    return f"replica {replica}"
