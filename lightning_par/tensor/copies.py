"""Axes of tensors of which neighbouring ranks hold copies: from the copies of each segment to the axis, and back.

A key projection with fewer heads than ranks gives a tensor over a `CopiedAxis`, whose size counts parts. A fused one has
copies of its key and value heads only::

    4 ranks, 4 query heads, 2 key heads         q over 4 parts, k and v over 2 parts with 2 copies
    fused output, segments (q, k, v)            a `MixedAxis` with copies (1, 2, 2), until it is taken apart
    q viewed as [2 key heads, 2 groups]         cut along both: over 2 parts, and each over a `ShareAxis` of its 2 ranks

[Note: two cuts] A tensor that is cut along two dims is a sharded tensor whose local part is one again. Rules compute on the
local part by torch functions, so that the inner cut follows by itself. Parts without an inner cut that meet it are copies:
what a rank adds to their gradients is an addend already, and nothing is summed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from lightning_par.runtime.axis import Axis, CopiedAxis, Wait, finest_axis
from lightning_par.runtime.parameter import Split
from lightning_par.tensor.registry import NoRule


class MixedAxis(CopiedAxis):
    """The axis of a fused tensor whose segments have different copies.

    It has no size: a rule that needs to know how many parts there are has no form for such a tensor, and gathers.

    Attributes:
        each: copies of each segment.
    """

    def __init__(self, finest: Axis, each: tuple[int, ...]) -> None:
        self.name, self.finest, self.gathers, self.each = finest.name, finest, finest.gathers, each

    @property
    def size(self) -> NoReturn:  # type: ignore[override]
        raise NoRule

    @property
    def coordinate(self) -> NoReturn:  # type: ignore[override]
        raise NoRule

    @property
    def copies(self) -> NoReturn:  # type: ignore[override]
        raise NoRule


class ShareAxis(Axis):
    """The ranks that hold one part, where each has a share of it, see [Note: two cuts]. They have no collectives of their own."""

    def __init__(self, finest: Axis, copies: int) -> None:
        super().__init__(finest.name, copies, finest.coordinate % copies)
        self.is_played = finest.is_played

    def begin_all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> Wait:
        raise NoRule

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        raise NoRule

    def begin_reduce_scatter(self, parts: torch.Tensor) -> tuple[torch.Tensor, Wait]:
        raise NoRule


@dataclass(frozen=True, kw_only=True)
class DoubleSplit(Split):
    """How a tensor is cut along two dims, see [Note: two cuts].

    Attributes:
        share: how a part is cut among the ranks that hold it.
        num_shares: how many these are.
    """

    share: Split
    num_shares: int

    def shard(self, tensor: torch.Tensor, size: int, coordinate: int, *, is_total: bool = False) -> torch.Tensor:
        part = super().shard(tensor, size // self.num_shares, coordinate // self.num_shares)
        return self.share.shard(part, self.num_shares, coordinate % self.num_shares)

    def unshard(self, shards: Sequence[torch.Tensor], *, is_total: bool = True) -> torch.Tensor:
        firsts = range(0, len(shards), self.num_shares)
        return super().unshard([self.share.unshard(shards[first : first + self.num_shares]) for first in firsts])


@functools.lru_cache(maxsize=64)  # one axis for all tensors that are cut alike
def axis_with(axis: Axis, copies: tuple[int, ...]) -> Axis:
    """The axis over the ranks of ``axis`` of a tensor whose segments have ``copies``; none given means 1 everywhere."""
    finest, different = finest_axis(axis), set(copies)
    if different <= {1}:
        return finest
    return CopiedAxis(finest, copies[0]) if len(different) == 1 else MixedAxis(finest, copies)


def cut_over(axis: Axis, dim: int, segments: tuple[int, ...]) -> Split:
    """How a tensor over ``axis`` is cut among the ranks behind it."""
    if isinstance(axis, MixedAxis):
        return Split(dim, segments, axis.each)
    return Split(dim, segments, (axis.copies,) * len(segments) if axis.copies > 1 else ())
