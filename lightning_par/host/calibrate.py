"""The blocks of a Trainer's module timed on the device of this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_par.errors import ConfigurationError
from lightning_par.host.batch import repeat_samples
from lightning_par.host.here import device_bytes
from lightning_par.host.outlook import taken_apart
from lightning_par.planner import Cluster
from lightning_par.planner.timing import Bench, Timings


def check_device(cluster: Cluster, name: str) -> None:
    """Refuse to measure a device for a cluster of others.

    Args:
        cluster: for which.
        name: by which the device calls itself.

    Raises:
        ConfigurationError: it is another one.
    """
    if cluster.device.name.lower() not in name.lower():
        raise ConfigurationError(
            f"cluster={cluster.name} has devices with {cluster.device.name} in their name, and this process has {name}: name a "
            "cluster of such devices; a copy of conf/cluster/your_own.yaml can be one"
        )


def time_run(
    trainer: Any, module: Any, data: Any, cluster: Cluster, device: torch.device, seconds: float, say: Callable[[str], None]
) -> Timings:
    """Time the blocks of a run over every tp of a node. One process; nothing is trained, and the module is not changed.

    Args:
        trainer, module, data, say: as for `lightning_par.host.outlook.outlook_of`.
        cluster: whose nodes; says how much of the memory may be used.
        device: what computes.
        seconds: how long that may take.

    Raises:
        ConfigurationError: the module, its batch or its optimizer cannot be planned for.
    """
    memory = int(min(cluster.device.memory_bytes, device_bytes(device)) * (1 - cluster.device.reserve))
    with taken_apart(trainer, say, module, data) as (anatomy, first):
        bench = Bench(anatomy, device, memory, lambda rows: repeat_samples(first, rows), say)
        return bench.time(cluster.devices_per_node, seconds)
