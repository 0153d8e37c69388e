"""Functions along the cut dim that need not see all of it: predictions and probabilities from logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_par.tensor.along_cut import greatest, log_probabilities, log_sum_exp, pick, top_indices
from lightning_par.tensor.registry import NoRule, rule_for, spellings
from lightning_par.tensor.rules.operand import has_out, normalise_dim, sharded_input
from lightning_par.tensor.rules.pointwise import pointwise
from lightning_par.tensor.rules.reduction import along_dim, along_third
from lightning_par.tensor.rules.shape import argument
from lightning_par.tensor.sharded import ShardedTensor

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def is_along_cut(tensor: ShardedTensor, dim: Any) -> bool:
    """Whether ``dim`` is the cut dim of a tensor that the functions of `lightning_par.tensor.along_cut` take."""
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    is_cut = isinstance(dim, int) and not isinstance(dim, bool) and normalise_dim(dim, tensor.ndim) == tensor.shard_dim
    return is_cut and len(tensor.segments) == 1 and tensor.axis.copies == 1 and tensor.dtype.is_floating_point


@rule_for(*spellings("softmax log_softmax"))
def softmax(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    dim = argument(args, kwargs, 1, "dim", None)
    if not is_along_cut(tensor, dim) or has_out(kwargs):
        return along_dim(function, args, kwargs)
    dtype = next((value for value in args[2:] if isinstance(value, torch.dtype)), kwargs.get("dtype"))
    scores = log_probabilities(tensor if dtype is None else tensor.rewrap(tensor.local.to(dtype)))
    result = scores.exp() if function.__name__ == "softmax" else scores
    return result.to(dtype or _dtype_of(function, tensor))


@rule_for(*spellings("logsumexp"))
def logsumexp(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    if not is_along_cut(tensor, argument(args, kwargs, 1, "dim", None)) or has_out(kwargs):
        return along_dim(function, args, kwargs)
    result = log_sum_exp(tensor).to(_dtype_of(function, tensor))
    return result if argument(args, kwargs, 2, "keepdim", False) else result.squeeze(tensor.shard_dim)


@rule_for(*spellings("argmax"))
def argmax(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    if not is_along_cut(tensor, argument(args, kwargs, 1, "dim", None)) or has_out(kwargs):
        return along_dim(function, args, kwargs)
    index = greatest(tensor)
    return index if argument(args, kwargs, 2, "keepdim", False) else index.squeeze(tensor.shard_dim)


@rule_for(*spellings("max"))
def maximum(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """``max(x, y)`` is pointwise, ``max(x, dim)`` gives values and where they are."""
    if isinstance(argument(args, kwargs, 1, "other", None), torch.Tensor):
        return pointwise(function, args, kwargs)
    tensor = sharded_input(args)
    if not is_along_cut(tensor, argument(args, kwargs, 1, "dim", None)) or has_out(kwargs):
        return along_dim(function, args, kwargs)
    index = greatest(tensor)
    found = (pick(tensor, index), index)
    if not argument(args, kwargs, 2, "keepdim", False):
        found = (found[0].squeeze(tensor.shard_dim), found[1].squeeze(tensor.shard_dim))
    return torch.return_types.max(found)


@rule_for(*spellings("topk"))
def topk(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    tensor = sharded_input(args)
    k, is_largest = argument(args, kwargs, 1, "k", None), argument(args, kwargs, 3, "largest", True)
    if not is_along_cut(tensor, argument(args, kwargs, 2, "dim", -1)) or has_out(kwargs) or not is_largest:
        return along_third(function, args, kwargs)
    if k > tensor.shape[tensor.shard_dim]:
        raise NoRule  # torch's own message
    index = top_indices(tensor, k)
    return torch.return_types.topk((pick(tensor, index), index))


def _dtype_of(function: Callable[..., Any], tensor: ShardedTensor) -> torch.dtype:
    """The dtype that ``function`` gives; autocast may change it."""
    if not torch.is_autocast_enabled(tensor.device.type):
        return tensor.dtype
    result: torch.Tensor = function(tensor.local.new_zeros(1), 0)
    return result.dtype
