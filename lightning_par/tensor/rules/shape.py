"""Views, transposes and repetitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from lightning_par.runtime.axis import CopiedAxis, finest_axis
from lightning_par.tensor.copies import MixedAxis, ShareAxis, axis_with, cut_over
from lightning_par.tensor.registry import NoRule, getters, rule_for, spellings
from lightning_par.tensor.rules.operand import normalise_dim, sharded_input
from lightning_par.tensor.rules.segment import resolve_shape, view_cut
from lightning_par.tensor.sharded import ShardedTensor

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def sizes_of(args: Args, kwargs: Kwargs, *names: str) -> tuple[Any, ...]:
    """Sizes or dims given as ``f(x, 1, 2)``, ``f(x, (1, 2))`` or by keyword."""
    rest = args[1:]
    if not rest:
        for name in names:
            if name in kwargs:
                return tuple(kwargs[name])
        raise NoRule
    return tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest


def argument(args: Args, kwargs: Kwargs, position: int, name: str, default: Any) -> Any:
    """The argument that stands at ``position`` or is called ``name``."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def viewed(tensor: ShardedTensor, shape: Sequence[int], via: Callable[..., torch.Tensor]) -> ShardedTensor:
    """``tensor`` in another shape; ``via`` is ``Tensor.view`` or ``Tensor.reshape``."""
    new_shape = resolve_shape(shape, tensor.numel())
    if not tensor.numel():
        raise NoRule
    axis, size = tensor.axis, finest_axis(tensor.axis).size
    try:
        parts = 1 if isinstance(axis, MixedAxis) else axis.size
        dim, segments = view_cut(tensor.shape, tensor.shard_dim, tensor.segments, new_shape, parts)
    except NoRule:
        return _viewed_in_groups(tensor, new_shape, via)
    if isinstance(axis, MixedAxis) and (len(segments) != len(axis.each) or not cut_over(axis, dim, segments).divides(size)):
        raise NoRule  # placed as if it were whole, and cannot be cut there
    local = via(tensor.local, cut_over(axis, dim, segments).local_shape(new_shape, size))
    if isinstance(local, ShardedTensor) and local.shard_dim == dim:  # the two cuts have become one
        if len(segments) > 1 or len(local.segments) > 1:
            raise NoRule
        local, axis = local.local, finest_axis(axis)
    return ShardedTensor(local, dim, segments, axis)


def _viewed_in_groups(tensor: ShardedTensor, shape: tuple[int, ...], via: Callable[..., torch.Tensor]) -> ShardedTensor:
    """Query heads viewed as ``[..., key heads, groups, ...]`` with fewer key heads than ranks: cut along both dims."""
    axis = tensor.axis
    if axis.copies > 1 or isinstance(axis, ShareAxis) or tensor.is_padded:
        raise NoRule
    for dim, (heads, groups) in enumerate(pairwise(shape)):
        if not 1 < heads < axis.size or axis.size % heads or groups * heads % axis.size:
            continue
        if view_cut(tensor.shape, tensor.shard_dim, tensor.segments, shape, heads) == (dim, (heads,)):
            copies = axis.size // heads
            local = via(tensor.local, (*shape[:dim], 1, groups // copies, *shape[dim + 2 :]))
            share = ShardedTensor(local, dim + 1, (groups,), ShareAxis(axis, copies))
            return ShardedTensor(share, dim, (heads,), CopiedAxis(axis, copies))
    raise NoRule


@rule_for(*spellings("view reshape view_as reshape_as"))
def view(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    second = args[1] if len(args) > 1 else kwargs.get("dtype", kwargs.get("other"))
    if isinstance(second, torch.dtype):
        raise NoRule
    shape = second.shape if isinstance(second, torch.Tensor) else sizes_of(args, kwargs, "size", "shape")
    if not isinstance(args[0], ShardedTensor):
        return args[0].reshape(shape)
    tensor = args[0]
    return viewed(tensor, shape, torch.Tensor.view if function.__name__.startswith("view") else torch.Tensor.reshape)


@rule_for(*spellings("flatten ravel"))
def flatten(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    start = normalise_dim(argument(args, kwargs, 1, "start_dim", 0), tensor.ndim)
    end = normalise_dim(argument(args, kwargs, 2, "end_dim", -1), tensor.ndim)
    middle = tensor.shape[start : end + 1].numel()
    return viewed(tensor, (*tensor.shape[:start], middle, *tensor.shape[end + 1 :]), torch.Tensor.reshape)


@rule_for(*spellings("unflatten"))
def unflatten(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    dim = normalise_dim(argument(args, kwargs, 1, "dim", None), tensor.ndim)
    sizes = resolve_shape(tuple(argument(args, kwargs, 2, "sizes", ())), tensor.shape[dim])
    return viewed(tensor, (*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :]), torch.Tensor.view)


def permuted(tensor: ShardedTensor, order: Sequence[int]) -> ShardedTensor:
    """Dims in another order: dim ``order[i]`` of ``tensor`` becomes dim ``i``."""
    return ShardedTensor(tensor.local.permute(*order), list(order).index(tensor.shard_dim), tensor.segments, tensor.axis)


@rule_for(*spellings("transpose swapaxes swapdims"))
def transpose(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    first = normalise_dim(argument(args, kwargs, 1, "dim0", kwargs.get("axis0")), tensor.ndim)
    second = normalise_dim(argument(args, kwargs, 2, "dim1", kwargs.get("axis1")), tensor.ndim)
    moved = {first: second, second: first}.get(tensor.shard_dim, tensor.shard_dim)
    return ShardedTensor(tensor.local.transpose(first, second), moved, tensor.segments, tensor.axis)


@rule_for(*spellings("permute"))
def permute(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    return permuted(tensor, [normalise_dim(dim, tensor.ndim) for dim in sizes_of(args, kwargs, "dims")])


@rule_for(*spellings("t adjoint"), *getters("T mT mH H"))
def transpose_last(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    if tensor.ndim < 2:
        raise NoRule
    result = function(tensor.local)
    last, reverses = tensor.ndim - 1, function == getters("T")[0]
    moved = last - tensor.shard_dim if reverses else {last: last - 1, last - 1: last}.get(tensor.shard_dim, tensor.shard_dim)
    return ShardedTensor(result, moved, tensor.segments, tensor.axis)


@rule_for(*spellings("movedim moveaxis"))
def movedim(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    source, destination = argument(args, kwargs, 1, "source", None), argument(args, kwargs, 2, "destination", None)
    sources = [normalise_dim(dim, tensor.ndim) for dim in ([source] if isinstance(source, int) else source)]
    targets = [normalise_dim(dim, tensor.ndim) for dim in ([destination] if isinstance(destination, int) else destination)]
    order = [dim for dim in range(tensor.ndim) if dim not in sources]
    for target, moved in sorted(zip(targets, sources, strict=True)):
        order.insert(target, moved)
    return permuted(tensor, order)


@rule_for(*spellings("unsqueeze"))
def unsqueeze(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    dim = normalise_dim(argument(args, kwargs, 1, "dim", None), tensor.ndim + 1)
    return ShardedTensor(tensor.local.unsqueeze(dim), tensor.shard_dim + (dim <= tensor.shard_dim), tensor.segments, tensor.axis)


@rule_for(*spellings("squeeze"))
def squeeze(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """A cut dim stays where its local part alone has one element. One that every rank holds whole is as good as any other."""
    tensor = sharded_input(args)
    asked = argument(args, kwargs, 1, "dim", tuple(range(tensor.ndim)))
    dims = {normalise_dim(dim, tensor.ndim) for dim in ((asked,) if isinstance(asked, int) else asked)}
    gone = tuple(sorted(dim for dim in dims if tensor.shape[dim] == 1))
    if tensor.shard_dim in gone:
        if tensor.axis.size > 1 or tensor.ndim == len(gone):
            raise NoRule
        local = tensor.local.squeeze(gone)
        return ShardedTensor(local, 0, (local.shape[0],), tensor.axis)
    moved = tensor.shard_dim - sum(dim < tensor.shard_dim for dim in gone)
    return ShardedTensor(tensor.local.squeeze(gone), moved, tensor.segments, tensor.axis)


@rule_for(*spellings("expand expand_as broadcast_to"))
def expand(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    like = argument(args, kwargs, 1, "other", None)
    sizes = list(like.shape if isinstance(like, torch.Tensor) else sizes_of(args, kwargs, "size"))
    if not isinstance(args[0], ShardedTensor):
        return args[0].expand(sizes)
    tensor = args[0]
    dim = tensor.shard_dim + len(sizes) - tensor.ndim
    if sizes[dim] not in (-1, tensor.shape[tensor.shard_dim]):
        if tensor.axis.size > 1:
            raise NoRule
        return ShardedTensor(tensor.local.expand(sizes), dim, (sizes[dim],), tensor.axis)  # every rank holds all of it
    sizes[dim] = -1
    return ShardedTensor(tensor.local.expand(sizes), dim, tensor.segments, tensor.axis)


@rule_for(*spellings("repeat"))
def repeat(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Repeating the cut dim repeats its segments."""
    tensor = sharded_input(args)
    times = sizes_of(args, kwargs, "repeats")
    dim = tensor.shard_dim + len(times) - tensor.ndim
    axis = axis_with(tensor.axis, tensor.cut.copies * times[dim])
    return ShardedTensor(tensor.local.repeat(*times), dim, tensor.segments * times[dim], axis)


@rule_for(*spellings("repeat_interleave"))
def repeat_interleave(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Every element of the cut dim stays with its copies, so each segment grows in place. Ghosts would grow too."""
    tensor = sharded_input(args)
    times, dim = argument(args, kwargs, 1, "repeats", None), argument(args, kwargs, 2, "dim", None)
    if not isinstance(times, int) or dim is None:
        raise NoRule
    dim = normalise_dim(dim, tensor.ndim)
    if dim == tensor.shard_dim and tensor.is_padded:
        raise NoRule
    segments = tuple(segment * times for segment in tensor.segments) if dim == tensor.shard_dim else tensor.segments
    return ShardedTensor(tensor.local.repeat_interleave(times, dim), tensor.shard_dim, segments, tensor.axis)


@rule_for(torch.view_as_complex, torch.view_as_real)
def complex_pairs(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """The last dim holds real and imaginary parts: it comes or goes, and is not the cut one."""
    tensor = sharded_input(args)
    if function is torch.view_as_complex and tensor.shard_dim == tensor.ndim - 1:
        raise NoRule
    return ShardedTensor(function(tensor.local), tensor.shard_dim, tensor.segments, tensor.axis)
