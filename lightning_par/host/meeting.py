"""Where the ranks of a run find each other: first in a store that all can reach, then in a process group.

In the store every rank says which host it is on. The first rank answers all with that, from which follow the numbers that they have
in the run, and with what only it knows, before Lightning looks for a checkpoint: where other ranks run Hydra by themselves, each
has made another folder.
"""

from __future__ import annotations

import atexit
import ipaddress
import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from lightning_par.errors import ConfigurationError
from lightning_par.host.hosts import order_by_host, this_host

INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class Meeting:
    """What a rank has learned.

    Attributes:
        store: where it was.
        rank: its number in the run.
        hosts: of each rank.
        is_renumbered: whether ranks have other numbers than they were started with.
        told: what the first rank told all.
    """

    store: Any
    rank: int
    hosts: tuple[str, ...]
    is_renumbered: bool
    told: Any


def meet(rank: int, world_size: int, timeout: timedelta, tells: Any) -> Meeting:
    """Find the others. Every rank calls it, at MASTER_ADDR and MASTER_PORT of its environment.

    Args:
        rank, world_size: as started.
        timeout: how long to wait for a rank.
        tells: what the first rank tells all, as JSON can have it; what others give counts for nothing.
    """
    store = _store_of_this_start(timeout)
    if store is None:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    return exchange(store, rank, world_size, tells)


def exchange(store: Any, rank: int, world_size: int, tells: Any) -> Meeting:
    """What every rank learns in a store; see `meet`. Two messages for each rank, all with the host of the store."""
    store.set(f"lightning_par/host/{rank}", this_host())
    if rank == 0:
        hosts = [store.get(f"lightning_par/host/{other}").decode() for other in range(world_size)]
        store.set("lightning_par/told", json.dumps([hosts, tells]))
    hosts, told = json.loads(store.get("lightning_par/told"))
    order = order_by_host(hosts)
    return Meeting(store, order.index(rank), tuple(hosts[started] for started in order), order != sorted(order), told)


def join(meeting: Meeting, backend: str, timeout: timedelta) -> None:
    """Make the process group of all ranks. Every rank calls it.

    Args:
        meeting: what this rank has learned.
        backend: gloo or nccl.
        timeout: how long a collective may wait for a rank.

    Raises:
        ConfigurationError: as `choose_interface`.
    """
    if len(set(meeting.hosts)) > 1:
        choose_interface([os.environ["MASTER_ADDR"], *(host.split()[0] for host in dict.fromkeys(meeting.hosts))])
    store = PrefixStore("default_pg", meeting.store)
    dist.init_process_group(backend, store=store, rank=meeting.rank, world_size=len(meeting.hosts), timeout=timeout)
    if backend == "nccl":  # which complains of groups that outlive a program
        atexit.register(_leave_group)


def choose_interface(others: Iterable[str]) -> None:
    """Have gloo listen where other hosts can reach it, unless the user has chosen; runs on GPUs use it for some messages, too.

    gloo takes the address that this host's own name stands for. On many systems that is 127.0.1.1 (Debian's /etc/hosts), which
    no other host can reach. Then it is the interface that leads to another host.

    Args:
        others: names or addresses of hosts, this one perhaps among them.

    Raises:
        ConfigurationError: none does.
    """
    name = socket.gethostname()
    if INTERFACE in os.environ or not _is_loopback(_address_of(name)):
        return
    own = next((own for other in others if not _is_loopback(own := _own_address_towards(other))), None)
    interfaces = psutil.net_if_addrs().items()
    found = [interface for interface, addresses in interfaces if any(address.address == own for address in addresses)]
    if own is None or not found:
        raise ConfigurationError(
            f"host {name} takes its own name for {_address_of(name) or 'no address'}, which no other host can reach: set "
            f"{INTERFACE} to its network interface, such as eth0; `ip -brief address` lists them"
        )
    os.environ[INTERFACE] = found[0]


def _address_of(name: str) -> str | None:
    try:
        return str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        return None


def _own_address_towards(host: str) -> str | None:
    """The address of this host from which messages to another one leave; nothing is sent."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _is_loopback(address: str | None) -> bool:
    return address is None or ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _store_of_this_start(timeout: timedelta) -> Any:
    """Where ranks that torchrun has started again find each other; None for the usual place.

    That one is in torchrun's own process, and still has the addresses of the ranks that are gone (read in torch 2.13).
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    return PrefixStore(f"restart {restart}", store)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
