"""The mesh: every rank's axes and process groups for one layout."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from lightning_par.layout import Coordinate, Layout
from lightning_par.runtime.axis import GroupAxis


class Mesh:
    """The process groups of a layout, seen from this rank. Collective over the world to build.

    Attributes:
        layout: the layout, dp resolved.
        rank: global rank of this process.
        coordinate: its place on the axes.
        tp: ranks that share the layers of one stage of one replica.
        dp: ranks that hold the same shard in every replica.
        pp: the ranks of one pipeline: one replica, at one tp coordinate.
        activations, gradients: the same ranks again for what stages send each other: a group for each kind of message, and with
            several stages on a rank one towards higher coordinates and one towards lower ones, so that none waits behind another.
        replica: all tp x pp ranks of one replica; they read the same batch.
        world: all ranks.
    """

    def __init__(self, layout: Layout, timeout: timedelta) -> None:
        if layout.dp is None or layout.world_size != dist.get_world_size():
            raise AssertionError(f"layout {layout} is not resolved for a world of {dist.get_world_size()}")
        self.layout, self.timeout = layout, timeout
        self.rank = dist.get_rank()
        self.coordinate: Coordinate = layout.coordinate_of(self.rank)
        tps, dps, pps = range(layout.tp), range(layout.dp), range(layout.pp)
        at = layout.rank_of
        pipelines = [[at(p, d, t) for p in pps] for d in dps for t in tps]
        self.tp = self._axis("tp", ([at(p, d, t) for t in tps] for p in pps for d in dps))
        self.dp = self._axis("dp", ([at(p, d, t) for d in dps] for p in pps for t in tps))
        self.pp = self._axis("pp", pipelines)
        up, down = self.pp, self._axis("pp_down", pipelines)
        self.activations, self.gradients = (up, down), (up, down)
        if layout.vp > 1:  # both kinds go both ways
            self.gradients = self._axis("pp_gradients_up", pipelines), self._axis("pp_gradients_down", pipelines)
        self.replica = self._axis("replica", ([at(p, d, t) for p in pps for t in tps] for d in dps))
        self.world = self._axis("world", [list(range(layout.world_size))])
        self._tied: dict[tuple[int, ...], GroupAxis] = {}
        self._copies: dict[int, GroupAxis] = {}

    def tied(self, stages: tuple[int, ...]) -> GroupAxis:
        """The axis over ``stages`` of this pipeline, for weights that those stages share.

        Collective over the world the first time it is asked for; the same set of stages gives the same axis again.
        """
        if stages not in self._tied:
            layout = self.layout
            every = [[layout.rank_of(p, d, t) for p in stages] for d in range(layout.dp or 1) for t in range(layout.tp)]
            self._tied[stages] = self._axis("tied", every)
        return self._tied[stages]

    def copies(self, count: int) -> GroupAxis:
        """The axis over ``count`` tp ranks in a row that hold copies of the same shards (see `Split`).

        Collective over the world the first time it is asked for.
        """
        if count not in self._copies:
            layout, dps = self.layout, range(self.layout.dp or 1)
            every = [
                [layout.rank_of(p, d, t) for t in range(first, first + count)]
                for p in range(layout.pp)
                for d in dps
                for first in range(0, layout.tp, count)
            ]
            self._copies[count] = self._axis("copies", every)
        return self._copies[count]

    @property
    def sent_bytes(self) -> dict[str, float]:
        """What this rank has sent in collectives over each axis; those over tied stages count for pp, those of copies for tp."""
        copies, tied = (sum(axis.sent_bytes for axis in axes.values()) for axes in (self._copies, self._tied))
        return {"tp": self.tp.sent_bytes + copies, "pp": tied, "dp": self.dp.sent_bytes}

    def barrier(self) -> None:
        """Wait for all ranks of the world."""
        wait_for_all(self.world.group)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank runs the first stage."""
        return self.coordinate.pp == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank runs the last stage, where the loss is."""
        return self.coordinate.pp == self.layout.last_pp

    def _axis(self, name: str, every: Iterable[list[int]]) -> GroupAxis:
        """Build all groups of one axis; keep the one that this rank is on (where it is on none, an axis of itself alone)."""
        mine = GroupAxis(name, cast(dist.ProcessGroup, dist.GroupMember.NON_GROUP_MEMBER), [self.rank], 0)
        for ranks in every:
            # new_group does not inherit the timeout of init_process_group; without it a lost rank is noticed after 30 minutes
            group = dist.new_group(ranks, timeout=self.timeout)
            if self.rank in ranks:
                mine = GroupAxis(name, group, ranks, ranks.index(self.rank))
        return mine


def wait_for_all(group: dist.ProcessGroup | None = None) -> None:
    """Wait for all ranks of a group; of the world by default."""
    is_nccl = dist.get_backend(group) == "nccl"  # which would guess at the device, with a warning
    dist.barrier(group=group, device_ids=[torch.cuda.current_device()] if is_nccl else None)
