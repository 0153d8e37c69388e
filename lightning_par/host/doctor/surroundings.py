"""What ranks need of the operating system: shared memory, open files, a network interface, a name that leads to an address."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_par.host.doctor.finding import Finding

_SHARED, _INFINIBAND = Path("/dev/shm"), Path("/sys/class/infiniband")
_GIB, _MIB = 2**30, 2**20
_ENOUGH_SHARED, _LEAST_SHARED = _GIB, 64 * _MIB  # workers of a loader pass batches there; NCCL takes some 10 MB for each rank
_ENOUGH_FILES = 4096  # each process group of a rank holds sockets, and workers pass a descriptor for each tensor
# Switches that make NCCL take slower ways.
_SLOW_SWITCHES = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SHM_DISABLE")
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Surroundings:
    """What there is.

    Attributes:
        shared_bytes: free in /dev/shm; None where there is none.
        open_files: that a process may have.
        locked_bytes: of memory that a process may lock; None without a limit.
        has_infiniband: whether this machine has such ports.
        interfaces: of the network, by name.
        host: the name of this machine.
        address: to which it leads; None to none.
        environment: the variables of this process.
    """

    shared_bytes: int | None
    open_files: int
    locked_bytes: int | None
    has_infiniband: bool
    interfaces: tuple[str, ...]
    host: str
    address: str | None
    environment: Mapping[str, str]


def find_surroundings() -> Surroundings:
    """Those of this process."""
    host, address = socket.gethostname(), None
    with suppress(OSError):
        address = socket.gethostbyname(host)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Surroundings(
        shared_bytes=shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_bytes=None if locked == resource.RLIM_INFINITY else locked,
        has_infiniband=_INFINIBAND.is_dir() and any(_INFINIBAND.iterdir()),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        host=host,
        address=address,
        environment=dict(os.environ),
    )


def judge_surroundings(found: Surroundings) -> list[Finding]:
    """A finding for each."""
    return [_shared(found), _files(found), *_locked(found), *_network(found), *_switches(found)]


def _shared(found: Surroundings) -> Finding:
    remedy = "give the container more: docker run --shm-size=16g, or a volume of medium Memory at /dev/shm in Kubernetes"
    if found.shared_bytes is None:
        return Finding("shared memory", "there is no /dev/shm: loaders with workers fail", "warning", remedy)
    words = f"{found.shared_bytes / _GIB:.2f} GiB free in /dev/shm"
    if found.shared_bytes < _LEAST_SHARED:
        return Finding("shared memory", words, "wrong", remedy)
    if found.shared_bytes < _ENOUGH_SHARED:
        return Finding("shared memory", words, "warning", remedy)
    return Finding("shared memory", words)


def _files(found: Surroundings) -> Finding:
    if found.open_files in range(_ENOUGH_FILES):
        return Finding("open files", f"{found.open_files} for each process", "warning", "ulimit -n 65536 before the training")
    words = "no limit" if found.open_files < 0 else f"{found.open_files:,} for each process"
    return Finding("open files", words)


def _locked(found: Surroundings) -> list[Finding]:
    """InfiniBand reads from memory that is locked."""
    if not found.has_infiniband:
        return []
    if found.locked_bytes is not None:
        words = f"{found.locked_bytes / _MIB:.0f} MiB for each process, and InfiniBand is there"
        remedy = "ulimit -l unlimited before the training; docker run --ulimit memlock=-1"
        return [Finding("locked memory", words, "warning", remedy)]
    return [Finding("locked memory", "no limit")]


def _network(found: Surroundings) -> list[Finding]:
    findings = []
    for name in _INTERFACES:
        word = found.environment.get(name, "")
        asked = [part for part in word.removeprefix("=").split(",") if part] if not word.startswith("^") else []
        if asked and not any(each.startswith(part) for part in asked for each in found.interfaces):
            there = ", ".join(found.interfaces)
            findings.append(Finding("network", f"{name}={word}: there is no such interface", "wrong", f"set it to one of {there}"))
    has_chosen = any(found.environment.get(name) for name in _INTERFACES)
    if found.address is None and not has_chosen:
        there = ", ".join(found.interfaces)
        remedy = f"add a line '127.0.1.1 {found.host}' to /etc/hosts, or set GLOO_SOCKET_IFNAME to one of {there}"
        findings.append(Finding("network", f"the name of this machine, {found.host}, has no address", "wrong", remedy))
    where = f" at {found.address}" if found.address else ""
    return findings or [Finding("network", f"{found.host}{where}; interfaces {', '.join(found.interfaces)}")]


def _switches(found: Surroundings) -> list[Finding]:
    return [
        Finding("network", f"{name}={found.environment[name]}: NCCL takes a slower way", "warning", f"unset {name}")
        for name in _SLOW_SWITCHES
        if found.environment.get(name, "0") != "0"
    ]
