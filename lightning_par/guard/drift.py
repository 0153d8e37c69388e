"""Ranks that must hold the same bits, compared every so many steps.

    parameters            over dp, where each replica holds the same shard; under ZeRO-3 every rank has a part of its own
    those that are whole  over tp; copied key heads over the ranks that hold them
    tied weights          over the stages that hold them
    optimizer states      as the parameters, where every replica has all (ZeRO 0); masters in half precision too

Of each tensor a rank sums the bits, as integers; one flipped bit always changes such a sum. The greatest and the least sum over an
axis are the same exactly if all are: one all-reduce of 16 bytes for each tensor on each axis, and one of 8 bytes over the world,
so that all ranks end together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_par.errors import ReplicaError
from lightning_par.guard.finding import describe_ranks
from lightning_par.layout import Layout
from lightning_par.runtime.axis import GroupAxis
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.parameter import ParameterSpec, get_spec
from lightning_par.zero.held import WEIGHT, Held
from lightning_par.zero.states import OptimizerStates

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Piece(NamedTuple):
    """What a rank holds.

    Attributes:
        name: in words.
        spec: of the parameter that it belongs to.
        values: flat.
        is_shared: whether every dp rank holds the same.
    """

    name: str
    spec: ParameterSpec
    values: Tensor
    is_shared: bool


class _Compared(NamedTuple):
    """What has been compared over one axis.

    Attributes:
        axis: the axis.
        named: the tensors with their names.
        checksums: of this rank's, int64 ``[tensors]``.
        differs: whether the axis has several, ``[tensors]``.
    """

    axis: GroupAxis
    named: Sequence[tuple[str, Tensor]]
    checksums: Tensor
    differs: Tensor

    def differences(self, rank: int) -> Iterator[_Difference]:
        """What this rank has of those that differ. Collective over the axis."""
        for (name, values), checksum, differs in zip(self.named, self.checksums.tolist(), self.differs.tolist(), strict=True):
            if differs:
                spread = _spread(values.to(self.checksums.device), self.axis)
                yield _Difference(name, self.axis.name, tuple(self.axis.ranks), rank, checksum, spread)


class _Difference(NamedTuple):
    """A tensor that is not the same on an axis, as one rank of it sees it.

    Attributes:
        name: of the tensor.
        axis: name of the axis.
        ranks: all ranks on it.
        rank: this one.
        checksum: what it has.
        spread: the most by which an element differs, as a part of the greatest element.
    """

    name: str
    axis: str
    ranks: tuple[int, ...]
    rank: int
    checksum: int
    spread: float


class DriftGuard:
    """Compares what ranks hold, once in ``every`` steps. Every rank makes the same calls.

    Args:
        states: who holds the parameters.
        mesh: of the run; the axes of tied stages and of copies exist.
        every: steps.
    """

    def __init__(self, states: OptimizerStates, mesh: Mesh, every: int) -> None:
        self._states, self._mesh, self._every = states, mesh, every
        self._has_whole_states = mesh.layout.zero == 0 or mesh.dp.size == 1
        self._num_steps = 0

    def before_step(self) -> None:
        """A step is about to be taken. Collective over all axes, once in ``every`` steps.

        Before and not after: a step of ZeRO 1 or 2 writes all parameters anew, from parts that only one rank has.

        Raises:
            ReplicaError: ranks hold different bits; on all ranks, with the same words.
        """
        self._num_steps += 1
        if self._num_steps % self._every == 0:
            self.check(f"before step {self._num_steps} of this run")

    @torch.no_grad()
    def check(self, when: str) -> None:
        """Compare now. Collective over all axes.

        Args:
            when: for the message.

        Raises:
            ReplicaError: as `before_step`.
        """
        mesh = self._mesh
        if mesh.world.size == 1:
            return
        device = next(self._states.module.parameters()).device
        compared = [_compare(axis, named, device) for axis, named in _axes(list(self._pieces()), mesh) if named]
        differs = torch.zeros((), dtype=torch.int64, device=device)
        for each in compared:
            differs += each.differs.sum()
        mesh.world.all_reduce(differs)
        if int(differs):
            every: list[Any] = [None] * mesh.world.size
            dist.all_gather_object(every, [found for each in compared for found in each.differences(mesh.rank)], mesh.world.group)
            raise ReplicaError(_describe([found for some in every for found in some], mesh.layout, when))

    def _pieces(self) -> Iterator[_Piece]:
        for held in self._states.weights():
            yield _piece(held, "")
        for held in self._states.held() if self._has_whole_states else ():
            if held.key != WEIGHT:
                yield _piece(held, f"{held.key} of ")
            elif held.values.dtype != held.parameter.dtype:
                yield _piece(held, "the master of ")


def _piece(held: Held, prefix: str) -> _Piece:
    spec = get_spec(held.parameter)
    return _Piece(prefix + spec.name, spec, held.values, held.is_shared)


def _axes(pieces: Sequence[_Piece], mesh: Mesh) -> Iterator[tuple[GroupAxis, list[tuple[str, Tensor]]]]:
    """Each axis of several ranks with what must be the same on it, in an order that its ranks share."""
    if mesh.dp.size > 1:
        yield mesh.dp, [(piece.name, piece.values) for piece in pieces if piece.is_shared]
    if mesh.tp.size > 1:
        yield mesh.tp, [(piece.name, piece.values) for piece in pieces if piece.spec.split is None]
        counts = {count for piece in pieces if piece.spec.split for count in piece.spec.split.copies if count > 1}
        for count in sorted(counts):
            yield mesh.copies(count), [each for piece in pieces for each in _copied(piece, count, mesh.tp.size)]
    for stages in sorted({piece.spec.stages for piece in pieces if len(piece.spec.stages) > 1}):
        tied = [(piece.name, piece.values) for piece in pieces if piece.spec.stages == stages]
        yield mesh.tied(stages), sorted(tied, key=lambda each: each[0])  # stages meet them in orders of their own


def _copied(piece: _Piece, count: int, size: int) -> Iterator[tuple[str, Tensor]]:
    """The segments of which ``count`` of ``size`` tp ranks hold copies; of a parameter that ZeRO-3 has in parts, none."""
    split = piece.spec.split
    if split is None or not split.copies:
        return
    shape = split.local_shape(piece.spec.shape, size)
    if piece.values.numel() == torch.Size(shape).numel():
        segments = piece.values.view(shape).split(split.local_segments(size), split.dim)
        yield from ((piece.name, part) for part, copies in zip(segments, split.copies, strict=True) if copies == count)


def _compare(axis: GroupAxis, named: Sequence[tuple[str, Tensor]], device: torch.device) -> _Compared:
    """Collective over the axis: the greatest sum, and by its complement the least."""
    checksums = torch.stack([_checksum(values, device) for _, values in named])
    greatest = torch.cat([checksums, ~checksums])
    axis.all_reduce(greatest, "max")
    most, least = greatest[: len(named)], ~greatest[len(named) :]
    return _Compared(axis, named, checksums, most != least)


def _spread(values: Tensor, axis: GroupAxis) -> float:
    """By how much a tensor differs on an axis; infinite where that is not a number. Collective over the axis."""
    limits = torch.cat([values.double(), -values.double()])
    axis.all_reduce(limits, "max")
    most, least = limits[: len(values)], -limits[len(values) :]
    spread = float((most - least).max() / limits.max().clamp(min=torch.finfo(torch.float64).tiny))
    return spread if math.isfinite(spread) else math.inf


def _checksum(values: Tensor, device: torch.device) -> Tensor:
    """The sum of a tensor's bits, read as integers of 8 bytes, modulo 2**64; what is left over at its end in smaller ones."""
    flat, per_integer = values.reshape(-1), 8 // values.element_size()
    length = flat.numel() // per_integer * per_integer
    head, tail = flat[:length], flat[length:]
    if head.storage_offset() % per_integer:  # an integer must begin where its size divides
        head = head.clone()
    return (head.view(torch.int64).sum() + tail.view(_SAME_SIZE[values.element_size()]).sum(dtype=torch.int64)).to(device)


_AXIS_WORDS = {"tied": "its stages", "copies": "the copies of tp"}


def _describe(differences: Sequence[_Difference], layout: Layout, when: str) -> str:
    """The greatest difference, from which others have come, with the ranks that agree with each other."""
    same: dict[tuple[str, str, tuple[int, ...]], dict[int, list[int]]] = {}
    for each in sorted(differences, key=lambda each: -each.spread):
        same.setdefault((each.name, each.axis, each.ranks), {}).setdefault(each.checksum, []).append(each.rank)
    (name, axis, _), groups = next(iter(same.items()))
    sides = ", unlike ".join(describe_ranks(sorted(ranks), layout) for ranks in sorted(groups.values(), key=len))
    more = f" ({len(same) - 1} more differ less)" if len(same) > 1 else ""
    return (
        f"{name} is no longer the same over {_AXIS_WORDS.get(axis, axis)}, {when}: so it is on {sides}{more}. Go on from a "
        "checkpoint from before; if it happens again on the same rank, its device is at fault, else a kernel that does not give "
        "the same bits twice"
    )
