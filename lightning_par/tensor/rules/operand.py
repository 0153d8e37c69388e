"""Bringing the operands of one call to the parts that belong together on this rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lightning_par.runtime.axis import Axis, finest_axis
from lightning_par.runtime.collective import copy_to, reduce_from, scatter_to
from lightning_par.runtime.parameter import Split
from lightning_par.tensor.copies import ShareAxis, axis_with, cut_over
from lightning_par.tensor.registry import NoRule
from lightning_par.tensor.rules.segment import take_segments
from lightning_par.tensor.sharded import ShardedTensor


def first_sharded(values: Iterable[Any]) -> ShardedTensor:
    """The sharded tensor of ``values`` that fewest ranks hold copies of, the first of those: others are brought to its parts."""
    found: ShardedTensor | None = None
    for value in values:
        if isinstance(value, ShardedTensor) and (found is None or value.axis.copies < found.axis.copies):
            found = value
    if found is None:
        raise NoRule
    return found


def sharded_input(args: tuple[Any, ...]) -> ShardedTensor:
    """The first positional argument, which must be the only place a rule expects a sharded tensor."""
    if args and isinstance(args[0], ShardedTensor):
        return args[0]
    raise NoRule


def has_out(kwargs: dict[str, Any]) -> bool:
    """Whether the call writes to a given tensor."""
    return kwargs.get("out") is not None


def normalise_dim(dim: int, ndim: int) -> int:
    """``dim`` counted from 0. Out of range is left to torch's own message."""
    if not isinstance(dim, int) or not -ndim <= dim < ndim:
        raise NoRule
    return dim + ndim if dim < 0 else dim


def replicated_part(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """A replicated tensor for use on every part: each rank sees part of its gradient, which is summed over the axis.

    Among the ranks that share one part nothing is replicated: there a plain tensor is a copy.
    """
    if isinstance(axis, ShareAxis):
        return tensor
    return copy_to(tensor, axis) if tensor.requires_grad and torch.is_grad_enabled() else tensor


def trains_replicated(tensor: ShardedTensor, others: Iterable[Any]) -> bool:
    """Whether a replicated operand gets a gradient from parts with ghosts, which must then add nothing to it."""
    return (
        tensor.is_padded
        and torch.is_grad_enabled()
        and any(
            isinstance(other, torch.Tensor) and not isinstance(other, ShardedTensor) and other.requires_grad for other in others
        )
    )


def aligned_part(value: Any, from_right: int, segments: tuple[int, ...], axis: Axis, ghosts: float | None = None) -> Any:
    """The local part of an operand that broadcasts against a dim cut into ``segments``.

    Args:
        value: a sharded tensor (cut alike, or in copies of which each rank takes its share), a replicated one (used as it is
            where it broadcasts along the cut dim, scattered where it has the full size), or no tensor at all.
        from_right: the cut dim of the result, counted from -1.
        ghosts: what the ghosts of a sharded tensor are to be; None leaves them as they are.
    """
    if isinstance(value, ShardedTensor):
        is_cut_alike = value.shard_dim - len(value.shape) == from_right and value.segments == segments
        if is_cut_alike and (value.axis is axis or value.axis.copies == axis.copies):
            return value.local if ghosts is None else value.filled(ghosts)
        return _share_of_copies(value, value.dim() + from_right, segments, axis)
    if not isinstance(value, torch.Tensor):
        return value
    dim = value.dim() + from_right
    if dim < 0 or value.shape[dim] == 1:
        return replicated_part(value, axis)
    if value.shape[dim] == sum(segments):
        cut = cut_over(axis, dim, segments)
        return cut.shard(value, axis.size, axis.coordinate) if isinstance(axis, ShareAxis) else scatter_to(value, axis, cut)
    raise NoRule


def summed(part: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of partial results over the axis, replicated."""
    if isinstance(part, ShardedTensor):  # cut along another dim too
        raise NoRule
    return reduce_from(part, axis)


def _share_of_copies(value: ShardedTensor, dim: int, segments: tuple[int, ...], axis: Axis) -> torch.Tensor:
    """This rank's share of a part that several ranks hold, for a result cut along ``dim`` in fewer copies.

    The gradient of the share is an addend of the part's gradient, so that plain autograd is right. The share is a copy, or
    the backward would keep the whole part.
    """
    finest = finest_axis(axis)
    if value.axis.size == 1:  # every rank holds all of it
        if dim < 0 or value.shape[dim] == 1 or (axis.size == 1 and value.shape[dim] == sum(segments)):
            return value.local
        if value.shape[dim] == sum(segments):
            return cut_over(axis, dim, segments).shard(value.local, finest.size, finest.coordinate)
    shares, rest = divmod(value.axis.copies, axis.copies)
    is_shared = isinstance(value.local, ShardedTensor)
    if rest or shares < 2 or is_shared or (value.shard_dim, value.segments) != (dim, segments):
        raise NoRule
    part = Split(dim, value.cut.local_segments(finest.size))
    return part.shard(value.local, shares, finest.coordinate // axis.copies % shares)


def piece_of_cut(tensor: ShardedTensor, start: int, stop: int) -> tuple[slice, tuple[int, ...], Axis]:
    """The slice of the local part between two positions of the cut dim, which must be ends of segments.

    Returns:
        With it, the segments and the axis of the piece.
    """
    cut, which = tensor.cut, take_segments(tensor.segments, start, stop)
    local = cut.local_segments(finest_axis(tensor.axis).size)
    first = sum(local[: which.start])
    return slice(first, first + sum(local[which])), tensor.segments[which], axis_with(tensor.axis, cut.copies[which])
