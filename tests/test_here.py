"""The devices at hand as a cluster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_par.host import here
from lightning_par.host.here import cluster_here
from lightning_par.planner.cluster import shipped_cluster

GIB = 2**30


@pytest.fixture(autouse=True)
def _uncalibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_processes_on_a_cpu_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(here, "_LIMIT", limit)
    whole = cluster_here(torch.device("cpu"), 1, 1).device.memory_bytes
    limit.write_text("max\n")
    halves, laptop = cluster_here(torch.device("cpu"), 3, 2), shipped_cluster("laptop", 3)
    assert halves.device.memory_bytes == whole // 2 and halves.num_devices == 6
    assert halves.device.flops == laptop.device.flops and halves.inside == laptop.inside
    limit.write_text(f"{whole // 4}\n")
    assert cluster_here(torch.device("cpu"), 1, 2).device.memory_bytes == whole // 4 // 2


@pytest.mark.parametrize(
    ("name", "file"),
    [("NVIDIA H100 80GB HBM3", "h100_8x"), ("NVIDIA A100-SXM4-40GB", "a100_8x"), ("NVIDIA GeForce RTX 4090", "your_own")],
)
def test_a_gpu_has_the_rates_of_the_file_that_its_name_fits(name: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=40 * GIB))
    found, shipped = cluster_here(torch.device("cuda", 0), 2, 4), shipped_cluster(file, 2)
    assert found.device.memory_bytes == 40 * GIB and (found.num_nodes, found.devices_per_node) == (2, 4)
    assert (found.device.flops, found.between) == (shipped.device.flops, shipped.between)
    assert found.source.startswith(f"{name}, whose rates are those of conf/cluster/{file}.yaml: ")
