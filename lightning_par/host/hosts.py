"""Which ranks are on which host: an order in which those of a host follow each other, and what lies inside a host then.

Ranks are numbered with tp fastest, so that tp peers are neighbours on a host as long as the ranks of each host have numbers in a
row, and as many as tp divides. torchrun numbers them so; SLURM with ``--distribution=block`` but not with ``cyclic``, and mpirun
may go round the hosts, too. So in a run ranks have the numbers that `order_by_host` gives them, however they were started.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from math import gcd
from pathlib import Path

from lightning_par.layout import Layout

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_host() -> str:
    """A name for this host that no other one has, as NCCL makes it: its name and boot, or what NCCL_HOSTID says.

    The boot, because machines made from one image may have one name. Source: NCCL 2.27, ``getHostHash`` in src/misc/utils.cc.
    """
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    return os.environ.get("NCCL_HOSTID") or f"{socket.gethostname()} {boot}".strip()


def order_by_host(hosts: Sequence[str]) -> list[int]:
    """The ranks in an order in which those of a host follow each other; the first stays the first.

    Args:
        hosts: of each rank, in the order in which they were started.

    Returns:
        At the place of each number that a rank has in the run, the number that it was started with.
    """
    place = {host: place for place, host in enumerate(dict.fromkeys(hosts))}
    return sorted(range(len(hosts)), key=lambda rank: (place[hosts[rank]], rank))


def describe_hosts(layout: Layout, hosts: Sequence[str], is_renumbered: bool = False) -> str:
    """What lies inside a host and what between hosts, in one line.

    Args:
        layout: dp resolved.
        hosts: of each rank.
        is_renumbered: whether ranks have other numbers than they were started with.
    """
    counts = list(Counter(hosts).values())
    ranks = f" x {counts[0]} ranks" if len(set(counts)) == 1 else f" with {', '.join(map(str, counts))} ranks"
    axes = [
        f"{axis} {'inside a host' if all(_is_inside(group, hosts) for group in groups) else 'between hosts'}"
        for axis, groups in _groups(layout).items()
        if len(groups[0]) > 1
    ]
    renumbered = "; ranks are numbered host by host, not as they were started" if is_renumbered else ""
    return f"{len(counts)} hosts{ranks}: {', '.join(axes)}{renumbered}"


def tp_between_hosts(layout: Layout, hosts: Sequence[str]) -> str | None:
    """A warning where tp peers are on several hosts, with what it costs and what to do; None where none are.

    Args:
        layout: dp resolved.
        hosts: of each rank, in the order of `order_by_host`.
    """
    groups = _groups(layout)["tp"]
    num_split = sum(not _is_inside(group, hosts) for group in groups)
    if not num_split:
        return None
    host, count = next((host, count) for host, count in Counter(hosts).items() if count % layout.tp)
    fitting = gcd(layout.tp, *Counter(hosts).values())
    use = f"use tp{fitting}, or " if fitting > 1 else "use "
    return (
        f"tp{layout.tp} with {count} ranks on host {host.split()[0]}: {num_split} of {len(groups)} tp groups are on several hosts, "
        f"and all their split layers wait for the network, forward and backward: {use}hosts with a multiple of {layout.tp} ranks"
    )


def _groups(layout: Layout) -> dict[str, list[list[int]]]:
    """The ranks of each group of each axis."""
    at, tps, dps, pps = layout.rank_of, range(layout.tp), range(layout.dp or 1), range(layout.pp)
    return {
        "tp": [[at(p, d, t) for t in tps] for p in pps for d in dps],
        "dp": [[at(p, d, t) for d in dps] for p in pps for t in tps],
        "pp": [[at(p, d, t) for p in pps] for d in dps for t in tps],
    }


def _is_inside(ranks: Iterable[int], hosts: Sequence[str]) -> bool:
    return len({hosts[rank] for rank in ranks}) == 1
