"""Functions along some dims: reductions, softmax, norms, sorting. Off the cut dim they run on the local part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from lightning_par.tensor.ghost import shielded
from lightning_par.tensor.registry import NoRule, rule_for, spellings
from lightning_par.tensor.rules.operand import has_out, normalise_dim, replicated_part, sharded_input, summed, trains_replicated
from lightning_par.tensor.rules.pointwise import pointwise
from lightning_par.tensor.rules.shape import argument, sizes_of
from lightning_par.tensor.sharded import ShardedTensor

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_DIM_SECOND = """
all amax amin any argmin argsort count_nonzero cummax cummin cumprod cumsum logcumsumexp
mean median nanmean nansum prod softmin sort std sum var std_mean var_mean
"""

_DIM_THIRD = "kthvalue norm roll"


def _dims(tensor: ShardedTensor, dim: Any) -> set[int]:
    """The dims that a ``dim`` argument names; all of them for None."""
    if dim is None or dim == ():
        return set(range(tensor.ndim))
    return {normalise_dim(one, tensor.ndim) for one in (dim if isinstance(dim, (tuple, list)) else (dim,))}


def _rewrap(tensor: ShardedTensor, result: Any, dims: set[int]) -> Any:
    """Wrap what came out of the local part; a result with fewer dims has lost ``dims``."""
    if isinstance(result, tuple):
        values = [_rewrap(tensor, value, dims) for value in result]
        return tuple(values) if type(result) is tuple else type(result)(values)
    if result.dim() == tensor.ndim:
        return tensor.rewrap(result)
    moved = tensor.shard_dim - sum(dim < tensor.shard_dim for dim in dims)
    return ShardedTensor(result, moved, tensor.segments, tensor.axis)


def _along(function: Callable[..., Any], args: Args, kwargs: Kwargs, dim: Any) -> Any:
    tensor = sharded_input(args)
    dims = _dims(tensor, dim)
    if tensor.shard_dim in dims or has_out(kwargs):
        raise NoRule
    return _rewrap(tensor, function(tensor.local, *args[1:], **kwargs), dims)


def _default_dim(function: Callable[..., Any]) -> int | None:
    """What ``dim`` is when it is not given."""
    return -1 if function.__name__ in ("argsort", "sort", "topk", "kthvalue") else None


@rule_for(*spellings(_DIM_SECOND))
def along_dim(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    dim = argument(args, kwargs, 1, "dim", kwargs.get("axis", kwargs.get("dims", _default_dim(function))))
    if isinstance(dim, bool):  # std(x, unbiased)
        raise NoRule
    return _along(function, args, kwargs, dim)


@rule_for(*spellings(_DIM_THIRD), torch.linalg.vector_norm)
def along_third(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    return _along(function, args, kwargs, argument(args, kwargs, 2, "dim", kwargs.get("dims", _default_dim(function))))


@rule_for(*spellings("flip"))
def flip(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    return _along(function, args, kwargs, sizes_of(args, kwargs, "dims"))


@rule_for(*spellings("min"))
def minimum(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """``min(x, y)`` is pointwise, ``min(x, dim)`` a reduction."""
    other = argument(args, kwargs, 1, "other", None)
    return pointwise(function, args, kwargs) if isinstance(other, torch.Tensor) else along_dim(function, args, kwargs)


@rule_for(*spellings("sum mean"))
def sum_or_mean(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Over the cut dim, the parts are summed over the axis."""
    tensor = sharded_input(args)
    dim = argument(args, kwargs, 1, "dim", kwargs.get("axis"))
    dims = _dims(tensor, dim)
    if tensor.shard_dim not in dims or has_out(kwargs):
        return _along(function, args, kwargs, dim)
    total = summed(function(tensor.filled(0), *args[1:], **kwargs), tensor.axis)
    if function.__name__ == "sum":
        return total
    return total / (tensor.shape[tensor.shard_dim] / tensor.local.shape[tensor.shard_dim])  # it was the mean of each part


@rule_for(functional.layer_norm, functional.rms_norm, torch.layer_norm, torch.rms_norm)
def norm(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Over trailing dims that are not cut; weight and bias are used on every part."""
    tensor = sharded_input(args)
    shape = argument(args, kwargs, 1, "normalized_shape", ())
    if tensor.shard_dim >= tensor.ndim - len(shape):
        raise NoRule
    rest = [replicated_part(value, tensor.axis) if isinstance(value, torch.Tensor) else value for value in args[1:]]
    named = {k: replicated_part(value, tensor.axis) if isinstance(value, torch.Tensor) else value for k, value in kwargs.items()}
    if not trains_replicated(tensor, (*args, *kwargs.values())):
        return tensor.rewrap(function(tensor.local, *rest, **named))
    return tensor.rewrap(shielded(function(tensor.filled(0), *rest, **named), tensor.cut, tensor.axis))


@rule_for(functional.normalize)
def normalize(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    return _along(function, args, kwargs, argument(args, kwargs, 2, "dim", 1))


@rule_for(functional.glu)
def glu(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """One half gates the other, so along the cut dim the halves must be segments."""
    value, gate = sharded_input(args).chunk(2, argument(args, kwargs, 1, "dim", -1))
    return value * gate.sigmoid()
