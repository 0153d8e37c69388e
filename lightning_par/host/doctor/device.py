"""What computes on this machine: its GPUs and how they are linked, or its CPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lightning_par.host.doctor.finding import Finding
from lightning_par.host.here import device_bytes, device_name

# What `nvidia-smi topo -m` calls the way between two GPUs, the quickest first; NV with a number is so many NVLinks.
_WAYS = {
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "the PCIe of a CPU",
    "NODE": "several PCIe roots of a CPU",
    "SYS": "two CPUs",
}
_SLOW = ("PHB", "NODE", "SYS")
_REMEDY_PCIE = "keep tp at the number of GPUs that NVLink joins, and use pp or dp over the others: see `nvidia-smi topo -m`"


@dataclass(frozen=True)
class Devices:
    """What computes here.

    Attributes:
        names, memory_bytes: of the GPUs that torch sees, or of the CPU alone.
        cores: of the CPU that this process may use.
        cuda: the CUDA that torch was built for; None for a build for CPUs.
        nccl: its version; None without.
        driver: version of the driver and the number of its GPUs, by nvidia-smi; None where that is not there.
        ways: how many pairs of GPUs are joined in which way, by the words of nvidia-smi.
    """

    names: tuple[str, ...]
    memory_bytes: int
    cores: int
    cuda: str | None = None
    nccl: str | None = None
    driver: tuple[str, int] | None = None
    ways: Mapping[str, int] = field(default_factory=dict)

    @property
    def are_gpus(self) -> bool:
        """Whether torch sees a GPU."""
        return bool(self.names) and not self.names[0].startswith("CPU")


def find_devices() -> Devices:
    """Those of this machine. Does not start CUDA on a machine without."""
    count = torch.cuda.device_count()
    devices = [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    query = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    return Devices(
        names=tuple(map(device_name, devices)),
        memory_bytes=min(map(device_bytes, devices)),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if count else None,
        driver=(query.split()[0], len(query.split())) if query.split() else None,
        ways=read_ways(_nvidia_smi("topo", "-m")) if count > 1 else {},
    )


def judge_devices(devices: Devices) -> list[Finding]:
    """A finding for the devices, and one for the links between GPUs."""
    gib = f"{devices.memory_bytes / 2**30:.1f} GiB"
    if not devices.are_gpus:
        found = f"{devices.names[0]}, {devices.cores} cores, {gib}: over gloo, to try layouts out"
        if devices.driver is None:
            return [Finding("devices", found)]
        version, count = devices.driver
        what = "a build for CPUs" if devices.cuda is None else f"built for CUDA {devices.cuda}"
        remedy = f"install a torch that driver {version} can run (https://pytorch.org/get-started), or a newer driver"
        return [Finding("devices", f"nvidia-smi names {count} GPUs, and torch sees none: it is {what}", "wrong", remedy)]
    kinds = ", ".join(f"{count} x {name}" for name, count in Counter(devices.names).items())
    driver = f", driver {devices.driver[0]}" if devices.driver else ""
    found = f"{kinds}, {gib} each; CUDA {devices.cuda}, NCCL {devices.nccl}{driver}"
    if len(set(devices.names)) > 1:
        remedy = "start on GPUs of one kind (CUDA_VISIBLE_DEVICES): the slowest one sets the pace of all"
        return [Finding("devices", found, "warning", remedy), *_links(devices)]
    return [Finding("devices", found), *_links(devices)]


def _links(devices: Devices) -> list[Finding]:
    if not devices.ways:
        return []
    found = ", ".join(f"{count} pairs by {_named(way)}" for way, count in sorted(devices.ways.items()))
    if set(devices.ways) & set(_SLOW):
        return [Finding("links", found, "warning", _REMEDY_PCIE)]
    return [Finding("links", found)]


def _named(way: str) -> str:
    return f"{way[2:]} NVLinks" if way.startswith("NV") else _WAYS.get(way, way)


def read_ways(matrix: str) -> dict[str, int]:
    """How many pairs of GPUs are joined in which way.

    Args:
        matrix: what ``nvidia-smi topo -m`` prints: a row for each GPU, first the columns of the GPUs.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", matrix)  # the headings are underlined
    rows = [line.split()[1:] for line in plain.splitlines() if re.match(r"GPU\d+\s", line)]
    pairs = Counter(row[column] for index, row in enumerate(rows) for column in range(index + 1, len(rows)))
    return dict(pairs)


def _nvidia_smi(*words: str) -> str:
    """What it prints; nothing where it is not there, fails, or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        return subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
