"""The links of a cluster, measured by all-reduces between processes: NCCL over GPUs, gloo on a CPU."""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from lightning_par.planner.link import Link
from lightning_par.planner.traffic import fit_link

_BYTES = tuple(4**power * 1024 for power in range(9))  # 1 KB to 64 MB
_NUM_WARM, _NUM_TIMED = 2, 7


def link_between_processes(rank: int, size: int, rendezvous: Path, on_gpu: bool) -> Link:
    """The link between processes of this machine. Each of ``size`` processes that have no group calls it.

    Args:
        rank: of this one, which on GPUs has the GPU of that number.
        size: processes.
        rendezvous: a file that is not there yet, the same for all.
        on_gpu: whether each has a GPU.
    """
    dist.init_process_group(backend(on_gpu), init_method=rendezvous.as_uri(), rank=rank, world_size=size)
    try:
        return _fit(None, size, device_of(rank, on_gpu))
    finally:
        dist.destroy_process_group()


def links_of_nodes(on_gpu: bool) -> dict[str, Link]:
    """The links that the ranks of torchrun have: ``inside`` a node with several, ``between`` several nodes.

    Every rank of the default group calls it, in the environment that torchrun gave it; the first one gets them.
    """
    rank, local, count, on_node = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    device, found = device_of(local, on_gpu), dict[str, Link]()
    for name, ranks in (("inside", list(range(on_node))), ("between", list(range(0, count, on_node)))):
        group = dist.new_group(ranks)
        if rank in ranks and len(ranks) > 1:
            found[name] = _fit(group, len(ranks), device)
        dist.barrier()  # one after the other
    return found


def backend(on_gpu: bool) -> str:
    return "nccl" if on_gpu else "gloo"


def device_of(local: int, on_gpu: bool) -> torch.device:
    """That of the process with this number on its machine, made its current one."""
    if on_gpu:
        torch.cuda.set_device(local)
    return torch.device("cuda", local) if on_gpu else torch.device("cpu")


def _fit(group: Any, size: int, device: torch.device) -> Link:
    """From the medians for tensors of every size. Collective over the group."""
    return fit_link(size, [(num_bytes, all_reduce_seconds(group, num_bytes, device)) for num_bytes in _BYTES])


def all_reduce_seconds(group: Any, num_bytes: int, device: torch.device) -> float:
    """The median of several all-reduces. Collective over the group, the default one for None."""
    tensor = torch.zeros(num_bytes // 4, device=device)
    found = []
    for _ in range(_NUM_WARM + _NUM_TIMED):
        dist.barrier(group)
        _synchronize(device)
        began = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        _synchronize(device)
        found.append(time.perf_counter() - began)
    return median(found[_NUM_WARM:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
