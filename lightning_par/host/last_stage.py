"""What only the ranks of the last stage have, on all stages."""

from __future__ import annotations

import io
from typing import Any

import torch
import torch.distributed as dist

from lightning_par.runtime.mesh import Mesh


def from_last_stage(value: Any, mesh: Mesh) -> Any:
    """What the last stage passed, on all stages. No tensor in it but on the CPU. Collective over pp."""
    if mesh.pp.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=mesh.pp.ranks[mesh.layout.last_pp], group=mesh.pp.group)
    return box[0]


def output_from_last_stage(output: Any, mesh: Mesh, device: torch.device) -> Any:
    """An output of a step, on all stages; tensors that are not on the CPU come to ``device``. Collective over pp.

    A pickled tensor goes back to the device that it was on, which belongs to another rank.
    """
    if mesh.pp.size == 1:
        return output
    buffer = io.BytesIO()
    if mesh.is_last_stage:
        torch.save(output, buffer)
    sent = from_last_stage(buffer.getvalue(), mesh)
    if mesh.is_last_stage:
        return output

    def place(storage: Any, location: str) -> Any:
        return storage if location == "cpu" else storage.to(device=device)

    return torch.load(io.BytesIO(sent), map_location=place, weights_only=False)
