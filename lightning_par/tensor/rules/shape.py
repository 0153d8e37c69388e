"""Views, transposes, splits and joins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from lightning_par.tensor.registry import NoRule, getters, rule_for, spellings
from lightning_par.tensor.rules.operand import aligned_part, first_sharded, has_out, normalise_dim, sharded_input
from lightning_par.tensor.rules.segment import resolve_shape, take_segments, view_cut
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
    parts = tensor.axis.size
    if not tensor.numel():
        raise NoRule
    dim, segments = view_cut(tensor.shape, tensor.shard_dim, tensor.segments, new_shape, parts)
    local_shape = list(new_shape)
    local_shape[dim] //= parts
    return ShardedTensor(via(tensor.local, local_shape), dim, segments, tensor.axis)


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
    if kwargs:
        raise NoRule
    first, second = (normalise_dim(dim, tensor.ndim) for dim in args[1:3])
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
    """The cut dim has at least ``axis.size`` elements, so it stays, even where its local part has one."""
    tensor = sharded_input(args)
    asked = argument(args, kwargs, 1, "dim", tuple(range(tensor.ndim)))
    dims = {normalise_dim(dim, tensor.ndim) for dim in ((asked,) if isinstance(asked, int) else asked)}
    gone = tuple(sorted(dim for dim in dims if tensor.shape[dim] == 1))
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
        raise NoRule
    sizes[dim] = -1
    return ShardedTensor(tensor.local.expand(sizes), dim, tensor.segments, tensor.axis)


@rule_for(*spellings("repeat"))
def repeat(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Repeating the cut dim repeats its segments."""
    tensor = sharded_input(args)
    times = sizes_of(args, kwargs, "repeats")
    dim = tensor.shard_dim + len(times) - tensor.ndim
    return ShardedTensor(tensor.local.repeat(*times), dim, tensor.segments * times[dim], tensor.axis)


@rule_for(*spellings("repeat_interleave"))
def repeat_interleave(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Every element of the cut dim stays with its copies, so each segment grows in place."""
    tensor = sharded_input(args)
    times, dim = argument(args, kwargs, 1, "repeats", None), argument(args, kwargs, 2, "dim", None)
    if not isinstance(times, int) or dim is None:
        raise NoRule
    dim = normalise_dim(dim, tensor.ndim)
    segments = tuple(segment * times for segment in tensor.segments) if dim == tensor.shard_dim else tensor.segments
    return ShardedTensor(tensor.local.repeat_interleave(times, dim), tensor.shard_dim, segments, tensor.axis)


def split_sizes(tensor: ShardedTensor, sizes: Sequence[int], dim: int) -> tuple[ShardedTensor, ...]:
    """Pieces of ``sizes`` along ``dim``. Along the cut dim each piece must be whole segments."""
    if dim != tensor.shard_dim:
        return tuple(tensor.rewrap(piece) for piece in tensor.local.split(list(sizes), dim))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    taken = [take_segments(tensor.segments, end - size, end) for size, end in zip(sizes, ends, strict=True)]
    pieces = tensor.local.split([size // tensor.axis.size for size in sizes], dim)
    return tuple(ShardedTensor(piece, dim, segments, tensor.axis) for piece, segments in zip(pieces, taken, strict=True))


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
    operands = [
        o for o in argument(args, kwargs, 0, "tensors", ()) if tuple(o.shape) != (0,)
    ]  # torch skips these; empty caches are such
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


@rule_for(torch.view_as_complex, torch.view_as_real)
def complex_pairs(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """The last dim holds real and imaginary parts: it comes or goes, and is not the cut one."""
    tensor = sharded_input(args)
    if function is torch.view_as_complex and tensor.shard_dim == tensor.ndim - 1:
        raise NoRule
    return ShardedTensor(function(tensor.local), tensor.shard_dim, tensor.segments, tensor.axis)


@rule_for(functional.pad)
def pad(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Padding of other dims. Pairs of widths are counted from the last dim."""
    tensor, widths = sharded_input(args), argument(args, kwargs, 1, "pad", ())
    first = 2 * (tensor.ndim - 1 - tensor.shard_dim)
    if any(widths[first : first + 2]):
        raise NoRule
    return tensor.rewrap(function(tensor.local, *args[1:], **kwargs))
