"""Splits, joins and padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from lightning_par.tensor.copies import axis_with
from lightning_par.tensor.registry import NoRule, rule_for, spellings
from lightning_par.tensor.rules.operand import aligned_part, first_sharded, has_out, normalise_dim, piece_of_cut, sharded_input
from lightning_par.tensor.rules.shape import argument
from lightning_par.tensor.sharded import ShardedTensor

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def split_sizes(tensor: ShardedTensor, sizes: Sequence[int], dim: int) -> tuple[ShardedTensor, ...]:
    """Pieces of ``sizes`` along ``dim``. Along the cut dim each piece must be whole segments."""
    if dim != tensor.shard_dim:
        return tuple(tensor.rewrap(piece) for piece in tensor.local.split(list(sizes), dim))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    taken = [piece_of_cut(tensor, end - size, end) for size, end in zip(sizes, ends, strict=True)]
    pieces = tensor.local.split([where.stop - where.start for where, _, _ in taken], dim)
    return tuple(ShardedTensor(piece, dim, segments, axis) for piece, (_, segments, axis) in zip(pieces, taken, strict=True))


@rule_for(*spellings("split split_with_sizes"))
def split(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    sizes = argument(args, kwargs, 1, "split_size_or_sections", kwargs.get("split_size", kwargs.get("split_sizes")))
    dim = normalise_dim(argument(args, kwargs, 2, "dim", 0), tensor.ndim)
    whole = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, whole - start) for start in range(0, whole, max(sizes, 1))]
    if sizes is None or sum(sizes) != whole:
        raise NoRule
    return split_sizes(tensor, sizes, dim)


@rule_for(*spellings("chunk"))
def chunk(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    dim = normalise_dim(argument(args, kwargs, 2, "dim", 0), tensor.ndim)
    size = -(-tensor.shape[dim] // argument(args, kwargs, 1, "chunks", 1))
    return split(function, (tensor, size, dim), {})


@rule_for(*spellings("unbind"))
def unbind(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    dim = normalise_dim(argument(args, kwargs, 1, "dim", 0), tensor.ndim)
    if dim == tensor.shard_dim:
        raise NoRule
    moved = tensor.shard_dim - (dim < tensor.shard_dim)
    return tuple(ShardedTensor(piece, moved, tensor.segments, tensor.axis) for piece in tensor.local.unbind(dim))


@rule_for(*spellings("cat concat concatenate"))
def cat(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Joined along the cut dim, the segments of the operands follow one another."""
    # torch skips tensors of shape [0], which empty caches are
    operands = [operand for operand in argument(args, kwargs, 0, "tensors", ()) if tuple(operand.shape) != (0,)]
    lead = first_sharded(operands)
    if has_out(kwargs):
        raise NoRule
    dim = normalise_dim(argument(args, kwargs, 1, "dim", kwargs.get("axis", 0)), lead.ndim)
    from_right, axis = lead.shard_dim - lead.ndim, lead.axis
    if dim != lead.shard_dim:
        if any(operand.shape[from_right] != lead.shape[from_right] for operand in operands):
            raise NoRule
        parts = [aligned_part(operand, from_right, lead.segments, axis) for operand in operands]
        return lead.rewrap(torch.cat(parts, dim))
    if not all(isinstance(operand, ShardedTensor) and operand.shard_dim == dim for operand in operands):
        raise NoRule
    segments = tuple(segment for operand in operands for segment in operand.segments)
    if any(operand.axis is not axis for operand in operands):
        axis = axis_with(axis, tuple(count for operand in operands for count in operand.cut.copies or (1,) * len(operand.segments)))
    return ShardedTensor(torch.cat([operand.local for operand in operands], dim), dim, segments, axis)


@rule_for(*spellings("stack"))
def stack(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    operands = argument(args, kwargs, 0, "tensors", ())
    lead = first_sharded(operands)
    if has_out(kwargs) or any(operand.shape != lead.shape for operand in operands):
        raise NoRule
    dim = normalise_dim(argument(args, kwargs, 1, "dim", 0), lead.ndim + 1)
    parts = [aligned_part(operand, lead.shard_dim - lead.ndim, lead.segments, lead.axis) for operand in operands]
    return ShardedTensor(torch.stack(parts, dim), lead.shard_dim + (dim <= lead.shard_dim), lead.segments, lead.axis)


@rule_for(functional.pad)
def pad(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Padding of other dims. Pairs of widths are counted from the last dim."""
    tensor, widths = sharded_input(args), argument(args, kwargs, 1, "pad", ())
    first = 2 * (tensor.ndim - 1 - tensor.shard_dim)
    if any(widths[first : first + 2]):
        raise NoRule
    return tensor.rewrap(function(tensor.local, *args[1:], **kwargs))
