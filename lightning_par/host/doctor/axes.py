"""A collective on each axis of a layout, between processes that are started for it: is its result right, how long does it take?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_par.host.doctor.finding import Finding
from lightning_par.host.links import all_reduce_seconds, backend, device_of
from lightning_par.layout import Layout
from lightning_par.runtime.mesh import Mesh

_TIMEOUT = timedelta(seconds=120)
SMALL_BYTES = 1024
_LARGE_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
_ELEMENTS = 1000
_LEAST_SHARE = 0.25  # of the datasheet's rate: less is another way than the one it is about


@dataclass(frozen=True)
class AxisPace:
    """An all-reduce on one axis, as its slowest rank saw it.

    Attributes:
        name: tp, dp or pp.
        size: ranks on it.
        is_right: whether every rank had the sum.
        small_seconds: for `SMALL_BYTES`.
        large_bytes: of the large one.
        large_seconds: for these.
    """

    name: str
    size: int
    is_right: bool
    small_seconds: float
    large_bytes: int
    large_seconds: float

    @property
    def bytes_per_second(self) -> float:
        """What each rank sends: in a ring each byte goes 2(n - 1)/n times over each link."""
        return 2 * (self.size - 1) / self.size * self.large_bytes / self.large_seconds


def axes_of_process(rank: int, layout: Layout, rendezvous: Path, on_gpu: bool) -> list[AxisPace]:
    """The axes as this rank sees them. Each rank of the layout calls it, in a process that has no group.

    Args:
        rank: of this one, which on GPUs has the GPU of that number.
        layout: with dp.
        rendezvous: a file that is not there yet, the same for all.
        on_gpu: whether each has a GPU.
    """
    init, world = rendezvous.as_uri(), layout.world_size
    dist.init_process_group(backend(on_gpu), init_method=init, rank=rank, world_size=world, timeout=_TIMEOUT)
    try:
        return measure_axes(layout, device_of(rank, on_gpu))
    finally:
        dist.destroy_process_group()


def measure_axes(layout: Layout, device: torch.device) -> list[AxisPace]:
    """The axes that have several ranks, one after the other, the groups of one at once, as in a step. Collective over the world."""
    mesh, found = Mesh(layout, _TIMEOUT), []
    large = _LARGE_BYTES[device.type]
    for axis in (mesh.tp, mesh.dp, mesh.pp):
        if axis.size == 1:
            continue
        numbers = torch.full((_ELEMENTS,), float(mesh.rank + 1), device=device)
        axis.all_reduce(numbers)
        is_right = bool((numbers == sum(rank + 1 for rank in axis.ranks)).all())
        small, much = (all_reduce_seconds(axis.group, num_bytes, device) for num_bytes in (SMALL_BYTES, large))
        found.append(AxisPace(axis.name, axis.size, is_right, small, large, much))
        mesh.barrier()
    return found


def slowest(by_rank: Sequence[Sequence[AxisPace]]) -> list[AxisPace]:
    """Of each axis the pace of its slowest rank."""
    return [
        AxisPace(
            seen[0].name,
            seen[0].size,
            all(each.is_right for each in seen),
            max(each.small_seconds for each in seen),
            seen[0].large_bytes,
            max(each.large_seconds for each in seen),
        )
        for seen in zip(*by_rank, strict=True)
    ]


def judge_axes(paces: Sequence[AxisPace], expected: float | None = None) -> list[Finding]:
    """A finding for each axis.

    Args:
        paces: of the axes.
        expected: bytes per second of the links, by their datasheet; None where it is not known.
    """
    return [_judge(pace, expected) for pace in paces]


def _judge(pace: AxisPace, expected: float | None) -> Finding:
    about = f"axis {pace.name}"
    if not pace.is_right:
        remedy = "run with NCCL_DEBUG=WARN or TORCH_DISTRIBUTED_DEBUG=DETAIL, and test the memory of the devices"
        return Finding(about, f"an all-reduce over {pace.size} ranks gave a wrong sum", "wrong", remedy)
    found = (
        f"{pace.size} ranks: {pace.small_seconds * 1e6:,.0f} us for {SMALL_BYTES // 1024} KiB, "
        f"{pace.bytes_per_second / 1e9:.3g} GB/s for {pace.large_bytes // 2**20} MiB"
    )
    if expected is not None and pace.bytes_per_second < _LEAST_SHARE * expected:
        remedy = "look for the way that NCCL takes with NCCL_DEBUG=INFO, and for the links with `nvidia-smi topo -m`"
        return Finding(about, f"{found}, of {expected / 1e9:.3g} GB/s by the datasheet", "warning", remedy)
    return Finding(about, found)
