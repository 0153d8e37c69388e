"""The machines of a run: what a device computes and holds, and what travels between devices.

A cluster is a YAML file of the config group ``cluster``::

    devices_per_node: 8
    device: {name: H100, memory_gib: 80, reserve: 0.08, memory_gb_per_s: 3350, attained_memory: 0.8,
             tflops: {float32: 60, bfloat16: 989}, attained: 0.7, launch_us: 4}
    inside: {gb_per_s: 450, latency_us: 3}     # each device to the others of its node, one way
    between: {gb_per_s: 50, latency_us: 8}     # each device to other nodes
    source: where the numbers are from
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lightning_par.errors import ConfigurationError
from lightning_par.planner.calibration import LINKS, Calibration
from lightning_par.planner.link import Link

SHIPPED = Path(__file__).parents[1] / "conf" / "cluster"  # the files that come with this package
_MAY_LACK = {"name"}
_DEVICE = {"memory_gib", "reserve", "memory_gb_per_s", "attained_memory", "tflops", "attained", "launch_us", *_MAY_LACK}
_LINK = {"gb_per_s", "latency_us"}
_KEYS = {"devices_per_node", "device", "inside", "between", "source"}


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        memory_bytes: of its memory.
        reserve: the part of it that no tensor gets: fragmentation, the runtime, communication buffers.
        memory_bandwidth: bytes per second that operations read and write, as far as they attain it.
        flops: operations per second of products, as far as they attain them, by dtype.
        peak_flops: by its datasheet.
        launch_seconds: the least that an operation takes.
        name: what is in the name by which such a device calls itself; empty for any.
    """

    memory_bytes: int
    reserve: float
    memory_bandwidth: float
    flops: Mapping[str, float]
    peak_flops: Mapping[str, float]
    launch_seconds: float
    name: str = ""

    @property
    def usable_bytes(self) -> int:
        """What tensors get."""
        return int(self.memory_bytes * (1 - self.reserve))


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices.

    Attributes:
        name: of its file.
        num_nodes: nodes of the run.
        devices_per_node: devices of each.
        device: each of them.
        inside: from a device to another one of its node.
        between: from a device to another node; every device has a way of its own.
        source: where the numbers are from.
        calibration: what was measured of it; its links are in the place of those above.
    """

    name: str
    num_nodes: int
    devices_per_node: int
    device: Device
    inside: Link
    between: Link
    source: str
    calibration: Calibration | None = None

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    def calibrated(self, calibration: Calibration) -> Cluster:
        """The cluster with what was measured of it."""
        inside, between = (calibration.links.get(name, link) for name, link in zip(LINKS, (self.inside, self.between), strict=True))
        return replace(self, calibration=calibration, inside=inside, between=between)


def read_cluster(config: Mapping[str, Any], name: str, num_nodes: int) -> Cluster:
    """A cluster from its config.

    Args:
        config: the mapping at the top of this file.
        name: of the file, for messages.
        num_nodes: nodes of the run.

    Raises:
        ConfigurationError: a key is missing, unknown, or not positive.
    """
    _check_keys(config, _KEYS, f"cluster={name}")
    device, links = config["device"], {}
    _check_keys(device, _DEVICE, f"cluster={name}: device")
    for key in LINKS:
        _check_keys(config[key], _LINK, f"cluster={name}: {key}")
        rate, latency = (_positive(config[key][word], f"cluster.{key}.{word}") for word in ("gb_per_s", "latency_us"))
        links[key] = Link(rate * 1e9, latency * 1e-6)
    numbers = {key: _positive(value, f"cluster.device.{key}") for key, value in device.items() if key not in ("tflops", "name")}
    peaks = {dtype: _positive(rate, f"cluster.device.tflops.{dtype}") * 1e12 for dtype, rate in device["tflops"].items()}
    per_node, nodes = config["devices_per_node"], num_nodes
    for value, word in ((per_node, "cluster.devices_per_node"), (nodes, "num_nodes")):
        if _positive(value, word) != int(value):
            raise ConfigurationError(f"{word}={value}: it must be a whole number")
    return Cluster(
        name,
        int(nodes),
        int(per_node),
        Device(
            int(numbers["memory_gib"] * 2**30),
            numbers["reserve"],
            numbers["memory_gb_per_s"] * 1e9 * numbers["attained_memory"],
            {dtype: peak * numbers["attained"] for dtype, peak in peaks.items()},
            peaks,
            numbers["launch_us"] * 1e-6,
            str(device.get("name") or ""),
        ),
        links["inside"],
        links["between"],
        str(config["source"]),
    )


def shipped_cluster(name: str, num_nodes: int) -> Cluster:
    """A cluster that comes with this package."""
    return read_cluster(yaml.safe_load((SHIPPED / f"{name}.yaml").read_text()), name, num_nodes)


def _check_keys(config: Any, expected: set[str], where: str) -> None:
    found = set(config) if isinstance(config, Mapping) else set()
    if missing := sorted(expected - found - _MAY_LACK):
        raise ConfigurationError(f"{where} has no {missing[0]}: add it; conf/cluster/h100_8x.yaml is a whole one")
    if unknown := sorted(found - expected):
        raise ConfigurationError(f"{where} has no key {unknown[0]}: its keys are {', '.join(sorted(expected))}")


def _positive(value: Any, word: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigurationError(f"{word}={value}: it must be a positive number")
    return float(value)
