"""Indexing and slicing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_par.runtime.axis import Axis
from lightning_par.tensor.along_cut import pick, pick_elements
from lightning_par.tensor.registry import NoRule, rule_for, spellings
from lightning_par.tensor.rules.along_cut import is_along_cut
from lightning_par.tensor.rules.operand import aligned_part, has_out, normalise_dim, piece_of_cut, sharded_input
from lightning_par.tensor.rules.shape import argument
from lightning_par.tensor.sharded import ShardedTensor

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def local_index(tensor: ShardedTensor, index: Any) -> tuple[tuple[Any, ...], int, tuple[int, ...], Axis]:
    """The index into the local part, the cut dim of the result, its segments and its axis.

    The cut dim may be kept or sliced at ends of segments. At most one index tensor, on another dim, is understood.
    """
    items = index if isinstance(index, tuple) else (index,)
    consumed = sum(item is not None and item is not Ellipsis for item in items)
    missing = (slice(None),) * (tensor.ndim - consumed)
    ellipsis = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    items = (*items[:ellipsis], *missing, *items[ellipsis + 1 :])
    integers, tensors = 0, 0
    source = target = 0
    found: tuple[int, tuple[int, ...], Axis] | None = None
    local: list[Any] = []
    for item in items:
        if item is None:
            local.append(item)
            target += 1
            continue
        if source == tensor.shard_dim:
            item, segments, axis = _slice_of_cut(tensor, item)
            found = (target, segments, axis)
        local.append(item)
        source += 1
        if isinstance(item, slice):
            target += 1
        elif isinstance(item, int) and not isinstance(item, bool):
            integers += 1
        elif _is_index_tensor(item):
            tensors += 1
            target += item.dim()
        else:
            raise NoRule
    if found is None or tensors > 1 or (tensors and integers):
        raise NoRule
    return tuple(local), *found


def _is_index_tensor(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and not isinstance(item, ShardedTensor) and item.dtype in (torch.int64, torch.int32)


def _is_element_wise(tensor: ShardedTensor, index: Any) -> bool:
    """Whether an index tensor for every dim takes single elements: ``log_probabilities[torch.arange(n), labels]``."""
    is_full = isinstance(index, tuple) and len(index) == tensor.ndim and all(map(_is_index_tensor, index))
    return is_full and is_along_cut(tensor, tensor.shard_dim)


def _slice_of_cut(tensor: ShardedTensor, item: Any) -> tuple[slice, tuple[int, ...], Axis]:
    """The slice of the local part for a slice of the cut dim, with its segments and its axis."""
    if not isinstance(item, slice):
        raise NoRule
    if any(isinstance(bound, torch.Tensor) for bound in (item.start, item.stop, item.step)):
        raise NoRule
    start, stop, step = item.indices(tensor.shape[tensor.shard_dim])
    if step != 1:
        raise NoRule
    return piece_of_cut(tensor, start, stop)


@rule_for(torch.Tensor.__getitem__)
def get_item(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    if _is_element_wise(tensor, args[1]):
        return pick_elements(tensor, args[1])
    index, dim, segments, axis = local_index(tensor, args[1])
    return ShardedTensor(tensor.local[index], dim, segments, axis)


@rule_for(torch.Tensor.__setitem__)
def set_item(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> None:
    tensor, value = sharded_input(args), args[2]
    index, dim, segments, axis = local_index(tensor, args[1])
    place = ShardedTensor(tensor.local.detach()[index], dim, segments, axis)
    tensor.local[index] = aligned_part(value, dim - place.ndim, segments, axis)
    tensor.follow_local()


@rule_for(*spellings("narrow"))
def narrow(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    dim = normalise_dim(argument(args, kwargs, 1, "dim", None), tensor.ndim)
    start, length = argument(args, kwargs, 2, "start", None), argument(args, kwargs, 3, "length", None)
    if not isinstance(start, int) or start < 0:
        raise NoRule
    return get_item(function, (tensor, (slice(None),) * dim + (slice(start, start + length),)), {})


@rule_for(*spellings("select"))
def select(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    dim = normalise_dim(argument(args, kwargs, 1, "dim", None), tensor.ndim)
    return get_item(function, (tensor, (slice(None),) * dim + (argument(args, kwargs, 2, "index", None),)), {})


@rule_for(*spellings("index_select"))
def index_select(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    dim = normalise_dim(argument(args, kwargs, 1, "dim", None), tensor.ndim)
    index = argument(args, kwargs, 2, "index", None)
    if dim == tensor.shard_dim or has_out(kwargs) or not _is_index_tensor(index):
        raise NoRule
    return tensor.rewrap(tensor.local.index_select(dim, index))


@rule_for(*spellings("gather take_along_dim"))
def gather(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Along another dim, with an index that is cut like the input; along the cut dim, with any replicated index."""
    tensor = sharded_input(args)
    if function in spellings("gather"):
        dim, index = argument(args, kwargs, 1, "dim", None), argument(args, kwargs, 2, "index", None)
    else:
        index, dim = argument(args, kwargs, 1, "indices", None), argument(args, kwargs, 2, "dim", None)
    dim = normalise_dim(dim, tensor.ndim)
    if is_along_cut(tensor, dim) and _is_index_tensor(index) and index.dim() == tensor.ndim and not has_out(kwargs):
        if function not in spellings("gather") and index.select(dim, 0).shape != tensor.local.select(dim, 0).shape:
            raise NoRule  # take_along_dim broadcasts
        return pick(tensor, index)
    if dim == tensor.shard_dim or index.shape[tensor.shard_dim] != tensor.shape[tensor.shard_dim] or has_out(kwargs):
        raise NoRule
    part = aligned_part(index, tensor.shard_dim - tensor.ndim, tensor.segments, tensor.axis, ghosts=0)
    return tensor.rewrap(tensor.local.gather(dim, part))


@rule_for(*spellings("tril triu"))
def triangle(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    if tensor.shard_dim >= tensor.ndim - 2 or has_out(kwargs):
        raise NoRule
    return tensor.rewrap(function(tensor.local, *args[1:], **kwargs))
