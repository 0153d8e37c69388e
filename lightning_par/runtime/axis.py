"""One direction of the mesh as a rank sees it: how many ranks there are, which one this is, and how they talk.

`Axis` is the seam. `GroupAxis` talks over a process group; `LocalAxis` has the same sizes but talks to nobody, so that
an installed module can be run on fake tensors in one process (shapes are right, values mean nothing). `CopiedAxis` is
an axis whose neighbouring ranks hold copies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist

from lightning_par.runtime.ring import ring_bytes

Wait = Callable[[], None]  # returns when what was begun is done

# torch 2.13 renamed both and warns of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Axis(ABC):
    """A mesh direction seen from one rank.

    Attributes:
        name: ``tp``, ``pp`` or ``dp``.
        size: ranks on it.
        coordinate: position of this rank, from 0.
        copies: ranks in a row that hold the same, as `runtime.parameter.Split` has it; 1 but for a `CopiedAxis`.
        is_played: whether one process plays a rank of it and there are no others.
        gathers: how often each function had to be given gathered tensors, because it has no rule for sharded ones.
    """

    copies = 1
    is_played = False

    def __init__(self, name: str, size: int, coordinate: int) -> None:
        self.name, self.size, self.coordinate = name, size, coordinate
        self.gathers: Counter[str] = Counter()

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        """Reduce ``tensor`` in place over the axis; ``op`` is ``sum`` or ``max``. Collective over the axis."""
        self.begin_all_reduce(tensor, op)()

    @abstractmethod
    def begin_all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> Wait:
        """`all_reduce` that returns at once; ``tensor`` is valid after the returned function was called."""

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all coordinates, in order; shapes must be equal. Collective over the axis."""

    @abstractmethod
    def begin_reduce_scatter(self, parts: torch.Tensor) -> tuple[torch.Tensor, Wait]:
        """Sum ``parts``, contiguous ``[size, ...]``, over the axis and give every rank its own: ``[...]`` at its coordinate.

        Collective over the axis. The result is valid after the returned function was called.
        """


class LocalAxis(Axis):
    """An axis of one process that plays one of ``size`` ranks and talks to nobody."""

    is_played = True

    def begin_all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> Wait:
        """Leave ``tensor`` as it is."""
        return _is_done

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Repeat ``tensor``."""
        return [tensor] * self.size

    def begin_reduce_scatter(self, parts: torch.Tensor) -> tuple[torch.Tensor, Wait]:
        """This rank's own part, not summed."""
        return parts[self.coordinate].clone(), _is_done


class GroupAxis(Axis):
    """An axis over a process group. An axis of size 1 never communicates.

    Attributes:
        group: the process group.
        ranks: global ranks on it, by coordinate.
        sent_bytes: what this rank has sent in collectives over it, by the ring.
    """

    def __init__(self, name: str, group: dist.ProcessGroup, ranks: list[int], coordinate: int) -> None:
        super().__init__(name, len(ranks), coordinate)
        self.group, self.ranks = group, ranks
        self.sent_bytes = 0.0

    def begin_all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> Wait:
        if self.size == 1:
            return _is_done
        self.sent_bytes += ring_bytes("all_reduce", tensor.nbytes, self.size)
        kind = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
        return _wait_for(dist.all_reduce(tensor, op=kind, group=self.group, async_op=True))

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if self.size == 1:
            return [tensor]
        gathered = tensor.new_empty((self.size * tensor.numel(),))
        self.sent_bytes += ring_bytes("all_gather", gathered.nbytes, self.size)
        _all_gather(gathered, tensor.contiguous().view(-1), group=self.group)
        return list(gathered.view(self.size, *tensor.shape).unbind(0))

    def begin_reduce_scatter(self, parts: torch.Tensor) -> tuple[torch.Tensor, Wait]:
        if self.size == 1:
            return parts[0], _is_done
        self.sent_bytes += ring_bytes("reduce_scatter", parts.nbytes, self.size)
        mine = parts.new_empty(parts.shape[1:])
        work = _reduce_scatter(mine.view(-1), parts.view(-1), group=self.group, async_op=True)
        return mine, _wait_for(work, parts)


class CopiedAxis(Axis):
    """An axis as seen by tensors of which ``copies`` neighbouring ranks hold the same part (see `Split`).

    Its size and coordinate count parts. What the copies compute with their part differs, so that the gradient of a copy
    is one addend of the part's gradient; `runtime.collective` keeps to that.

    Attributes:
        finest: the axis of the ranks.
    """

    def __init__(self, finest: Axis, copies: int) -> None:
        super().__init__(finest.name, finest.size // copies, finest.coordinate // copies)
        self.finest, self.copies, self.is_played = finest, copies, finest.is_played
        self.gathers = finest.gathers

    def begin_all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> Wait:
        """Every part counts once: in a sum, by the first of its copies."""
        if op == "sum" and self.finest.coordinate % self.copies:
            tensor.zero_()
        return self.finest.begin_all_reduce(tensor, op)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self.finest.all_gather(tensor)[:: self.copies]

    def begin_reduce_scatter(self, parts: torch.Tensor) -> tuple[torch.Tensor, Wait]:
        raise AssertionError("only activations of the hidden state are reduced and scattered, and these have no copies")


def finest_axis(axis: Axis) -> Axis:
    """The axis of the ranks behind an axis of parts."""
    return axis.finest if isinstance(axis, CopiedAxis) else axis


def _is_done() -> None:
    """Nothing to wait for."""


def _wait_for(work: dist.Work | None, *kept: torch.Tensor) -> Wait:
    """A function that waits for ``work``; it keeps the tensors ``kept`` alive until then."""
    assert work is not None

    def wait(work: dist.Work = work, kept: tuple[torch.Tensor, ...] = kept) -> None:
        work.wait()

    return wait
