"""Bringing the operands of one call to the parts that belong together on this rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lightning_par.runtime.axis import Axis
from lightning_par.runtime.collective import copy_to, scatter_to
from lightning_par.runtime.parameter import Split
from lightning_par.tensor.registry import NoRule
from lightning_par.tensor.sharded import ShardedTensor


def first_sharded(values: Iterable[Any]) -> ShardedTensor:
    """The first sharded tensor of ``values``."""
    for value in values:
        if isinstance(value, ShardedTensor):
            return value
    raise NoRule


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
    """A replicated tensor for use on every part: each rank sees part of its gradient, which is summed over the axis."""
    return copy_to(tensor, axis) if tensor.requires_grad and torch.is_grad_enabled() else tensor


def aligned_part(value: Any, from_right: int, segments: tuple[int, ...], axis: Axis) -> Any:
    """The local part of an operand that broadcasts against a dim cut into ``segments``.

    Args:
        value: a sharded tensor (cut alike), a replicated one (used as it is where it broadcasts along the cut dim,
            scattered where it has the full size), or no tensor at all.
        from_right: the cut dim of the result, counted from -1.
    """
    if isinstance(value, ShardedTensor):
        if value.shard_dim - len(value.shape) == from_right and value.segments == segments:
            return value.local
        raise NoRule
    if not isinstance(value, torch.Tensor):
        return value
    dim = value.dim() + from_right
    if dim < 0 or value.shape[dim] == 1:
        return replicated_part(value, axis)
    if value.shape[dim] == sum(segments):
        return scatter_to(value, axis, Split(dim, segments))
    raise NoRule
