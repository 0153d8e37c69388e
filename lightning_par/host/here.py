"""The devices at hand as a cluster: the shipped file that fits them, with the memory that they have."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import replace
from pathlib import Path

import torch

from lightning_par.planner.calibration import cached_of_device, read_calibration
from lightning_par.planner.cluster import Cluster, shipped_cluster

_FILES = {"H100": "h100_8x", "H200": "h100_8x", "A100": "a100_8x"}  # by what is in a GPU's name; of others we know no rates
_LIMIT, _CPU = Path("/sys/fs/cgroup/memory.max"), Path("/proc/cpuinfo")  # the first of a container


def cluster_here(device: torch.device, num_nodes: int, devices_per_node: int) -> Cluster:
    """The machines that a run is on, with what `lightning-par calibrate` has measured of such a device, if it has.

    Args:
        device: of this process; those of the others are equal.
        num_nodes: nodes of the run.
        devices_per_node: its devices, or on a CPU its processes, on each of them.

    Raises:
        ConfigurationError: the file of the calibration is damaged.
    """
    name, memory = device_name(device), device_bytes(device)
    file, whose = "laptop", "this CPU"
    if device.type == "cuda":
        file, whose = file_of(name) or "your_own", name
    else:
        memory //= devices_per_node
    shipped = shipped_cluster(file, num_nodes)
    here = replace(
        shipped,
        name="here",
        devices_per_node=devices_per_node,
        device=replace(shipped.device, memory_bytes=memory),
        source=f"{whose}, whose rates are those of conf/cluster/{file}.yaml: {shipped.source}",
    )
    measured = cached_of_device(name)
    if not measured:
        return here
    found = read_calibration(measured[-1])
    return replace(here.calibrated(found), source=f"measured on {found.date} as far as they were, else of {here.source}")


def peak_flops_here(device: torch.device, dtype: torch.dtype) -> float | None:
    """Products per second of a device by its datasheet; None where its name is in none of ours, as that of any CPU.

    Args:
        device: of this process.
        dtype: of the products.
    """
    if device.type != "cuda" or (dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"):
        return None  # of TF32 the files say nothing
    file = file_of(device_name(device))
    rates = {} if file is None else shipped_cluster(file, 1).device.peak_flops
    return rates.get(str(dtype).removeprefix("torch."))


def file_of(name: str) -> str | None:
    """The shipped cluster file with the rates of a GPU of this name, or None."""
    return next((file for word, file in _FILES.items() if word in name), None)


def device_name(device: torch.device) -> str:
    """What a device calls itself, such as ``NVIDIA H100 80GB HBM3`` or ``CPU AMD EPYC 9654``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*: (.*)", _CPU.read_text()) if _CPU.is_file() else None
    return f"CPU {found[1] if found else platform.processor() or platform.machine()}"


def device_bytes(device: torch.device) -> int:
    """Of a device's memory; of a CPU that of this host, or of this container where it may have less."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _LIMIT.read_text().strip() if _LIMIT.is_file() else "max"
    return min(whole, int(limit)) if limit.isdecimal() else whole
