"""The devices at hand as a cluster: the shipped file that fits them, with the memory that they have."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from lightning_par.planner.cluster import Cluster, shipped_cluster

_FILES = {"H100": "h100_8x", "H200": "h100_8x", "A100": "a100_8x"}  # by what is in a GPU's name; of others we know no rates
_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def cluster_here(device: torch.device, num_nodes: int, devices_per_node: int) -> Cluster:
    """The machines that a run is on.

    Args:
        device: of this process; those of the others are equal.
        num_nodes: nodes of the run.
        devices_per_node: its devices, or on a CPU its processes, on each of them.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        file = next((file for word, file in _FILES.items() if word in name), "your_own")
        memory = torch.cuda.get_device_properties(device).total_memory
        source = f"{name}, whose rates are those of conf/cluster/{file}.yaml"
    else:
        file, memory = "laptop", _host_bytes() // devices_per_node
        source = "this CPU, whose rates are those of conf/cluster/laptop.yaml"
    shipped = shipped_cluster(file, num_nodes)
    return replace(
        shipped,
        name="here",
        devices_per_node=devices_per_node,
        device=replace(shipped.device, memory_bytes=memory),
        source=f"{source}: {shipped.source}",
    )


def _host_bytes() -> int:
    """Of this host's memory, or of this container's where that may have less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _LIMIT.read_text().strip() if _LIMIT.is_file() else "max"
    return min(whole, int(limit)) if limit.isdecimal() else whole
