"""Links of a chosen rate below every library: what gloo has delivered at once arrives when a token bucket lets it.

Whoever communicates (lightning_par, DeepSpeed, torch.distributed) calls a `ProcessGroup`; its methods are replaced here. Each rank
has a bucket for its way to the ranks of its node and one for its way to other nodes: a byte takes a token, tokens come at the rate
of the link, none are saved up. A message arrives a latency after its bytes have left. A collective of d ranks begins when the last
of them has begun, and each sends what it sends on a ring, in so many messages one after the other::

    all-reduce                     2 n (d-1)/d    in 2 (d-1) messages      of a whole tensor of n bytes
    all-gather, reduce-scatter       n (d-1)/d    in   (d-1) messages
    reduce                           n            in   (d-1) messages      nothing from its root

On the ranks of a ring that are on one node there is one ring for each way out: each way has its share of the bytes.

Whoever posts a message goes on at once; it is `wait` that returns late. With every message, and before every collective, a time
travels, by a clock that all processes of a machine share.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.counting import PASSES, REDUCE
from lightning_par.planner import Cluster
from lightning_par.runtime.nested import tensors_in

now = time.monotonic
_STAMP = 1 << 20  # added to the tag of a message: that of its time
# by what torch calls on a group; it has renamed some (2.13)
_COLLECTIVES = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "allgather": "all-gather",
    "_allgather_base": "all-gather",
    "all_gather_single": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "reduce": REDUCE,
}
_OTHERS = ("broadcast", "gather", "scatter", "alltoall", "alltoall_base", "all_to_all_single")


class TokenBucket:
    """One way out of a rank.

    Args:
        bytes_per_second: tokens that come in a second.
    """

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second, self.free_at = bytes_per_second, 0.0

    def take(self, num_bytes: float, at: float) -> float:
        """When a message that is there at a time has left: it takes its tokens after those before it."""
        self.free_at = max(at, self.free_at) + num_bytes / self.bytes_per_second
        return self.free_at


class SlowLinks:
    """The ways out of this rank.

    Args:
        cluster: which ranks are on one node, and its links.
        rank: of this process.

    Attributes:
        is_on: whether messages are slow; to be changed by all ranks where none is on its way.
    """

    def __init__(self, cluster: Cluster, rank: int) -> None:
        self._per_node, self._node, self.is_on = cluster.devices_per_node, rank // cluster.devices_per_node, False
        self._inside, self._between = TokenBucket(cluster.inside.bytes_per_second), TokenBucket(cluster.between.bytes_per_second)
        self._latency = {True: cluster.inside.latency_seconds, False: cluster.between.latency_seconds}
        self._begun: deque[_Collective] = deque()
        self._allreduce: Callable[..., Any] = dist.ProcessGroup.allreduce

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, they are below all process groups of this process."""
        slow: dict[str, Any] = {name: self._collective(name, kind) for name, kind in _COLLECTIVES.items()}
        slow.update({name: self._refusing(name) for name in _OTHERS})
        slow.update(send=self._send(dist.ProcessGroup.send), recv=self._receive(dist.ProcessGroup.recv))
        originals = {name: method for name, method in vars(dist.ProcessGroup).items() if name in slow}
        for name in originals:
            setattr(dist.ProcessGroup, name, slow[name])
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(dist.ProcessGroup, name, original)

    def settle(self, last: _Collective) -> float:
        """When a collective is over. Those that were begun before it go first."""
        while last.over_at is None:
            each = self._begun.popleft()
            each.stamped.wait()
            start = float(each.stamp)
            if each.is_root:  # it waits for the others
                left = [start + num_bytes / bucket.bytes_per_second for bucket, num_bytes in each.shares]
            else:
                left = [bucket.take(num_bytes, start) for bucket, num_bytes in each.shares]
            each.over_at = max(left) + each.latency_seconds
        return last.over_at

    def _collective(self, name: str, kind: str) -> Callable[..., Any]:
        original = getattr(dist.ProcessGroup, name, None)

        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            assert original is not None
            size = group.size()
            if not self.is_on or size == 1:
                return original(group, *args, **kwargs)
            ranks = dist.get_process_group_ranks(group)
            whole = max(sum(tensor.nbytes for tensor in tensors_in(argument)) for argument in args[:2] if not _is_options(argument))
            is_root = kind == REDUCE and args[-1].rootRank == group.rank()
            shares, latency = self._shares(ranks, ring_sent(kind, whole, size)), self._latency[self._is_inside(ranks)]
            ready = max([now(), *(bucket.free_at for bucket, _ in shares)])
            stamp = torch.tensor([ready], dtype=torch.float64)
            stamped = self._allreduce(group, [stamp], _latest())
            work = original(group, *args, **kwargs)
            begun = _Collective(self, (work, stamped), stamp, shares, ring_messages(kind, size) * latency, is_root)
            self._begun.append(begun)
            return begun

        return call

    def _refusing(self, name: str) -> Callable[..., Any]:
        original = getattr(dist.ProcessGroup, name, None)

        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            assert original is not None
            if self.is_on and group.size() > 1:
                raise ValueError(f"{name}: it has no formula here, and would be too quick")
            return original(group, *args, **kwargs)

        return call

    def _send(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: dist.ProcessGroup, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
            if not self.is_on:
                return original(group, tensors, peer, tag)
            ranks = [dist.get_global_rank(group, peer)]
            is_inside = self._is_inside(ranks)
            left = (self._inside if is_inside else self._between).take(sum(tensor.nbytes for tensor in tensors), now())
            stamp = torch.tensor([left + self._latency[is_inside]], dtype=torch.float64)
            works = [original(group, [stamp], peer, tag + _STAMP), original(group, tensors, peer, tag)]
            return _Message(works, torch.tensor([left], dtype=torch.float64), stamp)

        return call

    def _receive(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: dist.ProcessGroup, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
            if not self.is_on:
                return original(group, tensors, peer, tag)
            stamp = torch.empty(1, dtype=torch.float64)
            return _Message([original(group, [stamp], peer, tag + _STAMP), original(group, tensors, peer, tag)], stamp)

        return call

    def _is_inside(self, ranks: Sequence[int]) -> bool:
        return all(rank // self._per_node == self._node for rank in ranks)

    def _shares(self, ranks: Sequence[int], num_bytes: float) -> list[tuple[TokenBucket, float]]:
        """What a ring over some ranks sends over each way out of this one."""
        here = sum(rank // self._per_node == self._node for rank in ranks)
        shares = [(self._inside, num_bytes)] if here > 1 else []
        return shares if here == len(ranks) else [*shares, (self._between, num_bytes / here)]


class _Collective(dist.Work):
    """One that is over late."""

    def __init__(
        self,
        links: SlowLinks,
        works: tuple[Any, Any],
        stamp: torch.Tensor,
        shares: list[tuple[TokenBucket, float]],
        latency_seconds: float,
        is_root: bool,
    ) -> None:
        super().__init__()
        self._links, (self._work, self.stamped), self.stamp, self.shares = links, works, stamp, shares
        self.latency_seconds, self.is_root = latency_seconds, is_root
        self.over_at: float | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._work.wait()
        sleep_until(self._links.settle(self))
        return True

    def is_completed(self) -> bool:
        return bool(self._work.is_completed() and self.over_at is not None and now() >= self.over_at)


class _Message(dist.Work):
    """One that has left, or is there, late."""

    def __init__(self, works: list[Any], at: torch.Tensor, *kept: torch.Tensor) -> None:
        super().__init__()
        self._works, self._at, self._kept = works, at, kept

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self._works:
            work.wait()
        sleep_until(float(self._at))
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works) and now() >= float(self._at)


def ring_sent(kind: str, whole_bytes: float, size: int) -> float:
    """Bytes that a rank sends; the table at the top of this file."""
    return whole_bytes if kind == REDUCE else PASSES[kind] * whole_bytes * (size - 1) / size


def ring_messages(kind: str, size: int) -> int:
    """Messages one after the other."""
    return PASSES.get(kind, 1) * (size - 1)


def sleep_until(at: float) -> None:
    """Nothing where it is later already."""
    seconds = at - now()
    if seconds > 0:
        time.sleep(seconds)


def _latest() -> Any:
    options: Any = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MAX
    return options


def _is_options(argument: Any) -> bool:
    return not isinstance(argument, torch.Tensor | list)
