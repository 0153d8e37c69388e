"""Seconds of collectives, by the ring (Thakur et al. 2005), over the links that a group of ranks has.

With d ranks each of them sends what `lightning_par.runtime.ring` says, an all-reduce in 2 (d-1) messages, others in d-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_par.layout import Layout
from lightning_par.planner.cluster import Cluster
from lightning_par.planner.link import Link
from lightning_par.runtime.ring import ring_bytes

_LEAST = 1e-12  # seconds of a message or of a byte: noise can make a fit negative


@dataclass(frozen=True)
class Ring:
    """A group of ranks.

    Attributes:
        size: ranks.
        link: from each of them to the next.
        is_inside: whether all of them are on one node.
    """

    size: int
    link: Link
    is_inside: bool

    def sent_bytes(self, kind: str, num_bytes: float) -> float:
        """What each rank sends in a collective, of a whole tensor of ``num_bytes``."""
        return ring_bytes(kind, num_bytes, self.size)

    def seconds(self, kind: str, num_bytes: float) -> float:
        """How long a collective takes."""
        if self.size == 1:
            return 0.0
        messages = (2 if kind == "all_reduce" else 1) * (self.size - 1)
        return messages * self.link.latency_seconds + self.sent_bytes(kind, num_bytes) / self.link.bytes_per_second


def fit_link(size: int, times: Sequence[tuple[float, float]]) -> Link:
    """The link with which a ring comes nearest to what was measured, in the least squares of relative errors.

    Args:
        size: ranks.
        times: of all-reduces, the bytes of the whole tensor and the seconds.
    """
    by_latency, by_byte = Ring(size, Link(np.inf, 1.0), True), Ring(size, Link(1.0, 0.0), True)
    columns = [[ring.seconds("all_reduce", num_bytes) / seconds for ring in (by_latency, by_byte)] for num_bytes, seconds in times]
    latency, per_byte = np.linalg.lstsq(np.array(columns), np.ones(len(times)), rcond=None)[0]
    return Link(1 / max(float(per_byte), _LEAST), max(float(latency), _LEAST))


def tp_ring(layout: Layout, cluster: Cluster) -> Ring:
    """The ranks that share a layer: neighbours."""
    return _ring(layout.tp, 1, cluster)


def dp_ring(layout: Layout, cluster: Cluster) -> Ring:
    """The ranks that hold the same part of the model: tp apart."""
    return _ring(layout.dp or 1, layout.tp, cluster)


def stage_link(layout: Layout, cluster: Cluster) -> Link:
    """From a stage to the next one: tp x dp apart. Where one pair of stages is on two nodes, all wait for it."""
    return cluster.inside if layout.world_size <= cluster.devices_per_node else cluster.between


def _ring(size: int, apart: int, cluster: Cluster) -> Ring:
    """Of ``size`` ranks, ``apart`` from one another.

    Those of a ring that are on one node share the ways out of it: one ring goes out by each, so that it is as wide as all of them.
    """
    if size * apart <= cluster.devices_per_node:
        return Ring(size, cluster.inside, is_inside=True)
    on_node = max(1, cluster.devices_per_node // apart)
    wide = min(cluster.between.bytes_per_second * on_node, cluster.inside.bytes_per_second)
    return Ring(size, Link(wide, cluster.between.latency_seconds), is_inside=False)
