"""How many processes a run starts when ``trainer.devices`` is left to us."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning_par.host.launch.started import started_on_this_machine
from lightning_par.layout import Layout

_MOST_PROCESSES = 8  # that nobody asked for: each takes half a GiB before it holds anything


def choose_devices(trainer: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The Trainer's ``accelerator`` and ``devices``, with ``auto`` filled in.

    ``accelerator: auto`` is CUDA where there is any, else the CPU. ``devices: auto`` is

    - what torchrun or srun has started on this machine, under them;
    - all devices, on CUDA;
    - what the layout needs (`needed_devices`), on the CPU, where a device is a process; for ``auto`` one for each core, 8 at most.
    """
    accelerator, devices = trainer.get("accelerator", "auto"), trainer.get("devices", "auto")
    if accelerator == "auto":
        import torch

        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if devices == "auto":
        started = started_on_this_machine()
        devices = started or ("auto" if accelerator != "cpu" else needed_devices(layout, trainer.get("num_nodes", 1)))
    return {"accelerator": accelerator, "devices": devices}


def needed_devices(layout: Layout, num_nodes: int = 1) -> int:
    """Devices of one node that the layout needs: tp x pp x dp over the nodes.

    dp left out counts as 1, or as 2 where there is a ZeRO stage, so that there is something to shard. ``auto`` needs
    none in particular, and takes a process for each core.
    """
    if layout.auto:
        return min(os.cpu_count() or 1, _MOST_PROCESSES)
    replicas = layout.dp or (2 if layout.zero else 1)
    return max(1, layout.model_size * replicas // num_nodes)
