"""What the ranks find out together along the dim that is cut, without any of them seeing all of it.

Every function takes a sharded tensor with one segment and works along its cut dim; ghosts take no part. Results are
replicated, but for probabilities, which are cut alike. All are collective over the tensor's axis.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_par.runtime.axis import Axis
from lightning_par.runtime.collective import copy_to, reduce_from
from lightning_par.tensor.ghost import shielded
from lightning_par.tensor.sharded import ShardedTensor
from lightning_par.tensor.vocabulary import local_rows


def pick(tensor: ShardedTensor, index: torch.Tensor) -> torch.Tensor:
    """``tensor.gather(shard_dim, index)``: the rank that holds an entry gives it, the others give 0. One all-reduce."""
    dim, axis = tensor.shard_dim, tensor.axis
    place, elsewhere = local_rows(index, tensor.local.shape[dim], axis.coordinate, tensor.shape[dim])
    return reduce_from(tensor.local.gather(dim, place).masked_fill(elsewhere, 0), axis)


def pick_elements(tensor: ShardedTensor, index: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """``tensor[index]`` with an index tensor for every dim, negative ones counted from the end. One all-reduce."""
    dim, axis, size = tensor.shard_dim, tensor.axis, tensor.shape[tensor.shard_dim]
    ids = torch.where(index[dim] < 0, index[dim] + size, index[dim])
    place, elsewhere = local_rows(ids, tensor.local.shape[dim], axis.coordinate, size)
    places = (*index[:dim], place, *index[dim + 1 :])
    return reduce_from(tensor.local[places].masked_fill(elsewhere, 0), axis)


def log_sum_exp(tensor: ShardedTensor) -> torch.Tensor:
    """``tensor.logsumexp(shard_dim, keepdim=True)``, in fp32 for a half precision. Two all-reduces, none backward."""
    top, rest = _LogSumExp.apply(tensor.without_ghosts(), tensor.shard_dim, tensor.axis)
    return top + rest


def log_probabilities(tensor: ShardedTensor) -> ShardedTensor:
    """``tensor.log_softmax(shard_dim)``, cut alike, in fp32 for a half precision. Two all-reduces, and one backward."""
    top, rest = _LogSumExp.apply(tensor.without_ghosts(), tensor.shard_dim, tensor.axis)
    local = tensor.local.to(rest.dtype) - top - copy_to(rest, tensor.axis)
    return tensor.rewrap(shielded(local, tensor.cut, tensor.axis))


def greatest(tensor: ShardedTensor) -> torch.Tensor:
    """``tensor.argmax(shard_dim, keepdim=True)``: every rank offers its best, and only these are gathered."""
    dim, axis = tensor.shard_dim, tensor.axis
    own = tensor.without_ghosts().detach()
    value = local_maximum(own, dim)
    index = own.argmax(dim, keepdim=True) if own.shape[dim] else torch.zeros_like(value, dtype=torch.long)
    index = index + axis.coordinate * tensor.local.shape[dim]
    best = torch.stack(axis.all_gather(value)).argmax(0, keepdim=True)
    return torch.stack(axis.all_gather(index)).gather(0, best).squeeze(0)


def top_indices(tensor: ShardedTensor, k: int) -> torch.Tensor:
    """The indices of ``tensor.topk(k, shard_dim)``: every rank offers its best k, and only these are gathered.

    A rank with fewer than k entries offers -inf instead. Ranks with ghosts come last, so that in a stable sort an entry
    that is -inf itself stands before what is offered instead of one.
    """
    dim, axis = tensor.shard_dim, tensor.axis
    own = tensor.without_ghosts().detach()
    value, index = own.topk(min(k, own.shape[dim]), dim)
    missing = min(k, tensor.local.shape[dim]) - value.shape[dim]
    widths = [0, 0] * (tensor.ndim - 1 - dim) + [0, missing]
    value = torch.nn.functional.pad(value, widths, value=-torch.inf)
    index = torch.nn.functional.pad(index + axis.coordinate * tensor.local.shape[dim], widths)
    order = torch.cat(axis.all_gather(value), dim).sort(dim=dim, descending=True, stable=True).indices.narrow(dim, 0, k)
    return torch.cat(axis.all_gather(index), dim).gather(dim, order)


class _LogSumExp(torch.autograd.Function):
    """m = max(x) and z = log(sum(exp(x - m))) over all ranks, so that m + z is the result. No gradient for m.

    dz/dx = exp(x - m - z)
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, axis: Axis) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        top = local_maximum(wide, dim)
        axis.all_reduce(top, "max")
        top.masked_fill_(top.isinf(), 0)  # as torch does, since inf - inf is undefined
        total = (wide - top).exp().sum(dim, keepdim=True)
        axis.all_reduce(total)
        rest = total.log()
        ctx.save_for_backward(x, top, rest)
        ctx.mark_non_differentiable(top)
        return top, rest

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, top, rest = ctx.saved_tensors
        return (x - top - rest).exp_().mul_(grad).to(x.dtype), None, None


def local_maximum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``x.amax(dim, keepdim=True)`` for a ``dim`` from 0; -inf where this rank holds nothing along it."""
    if x.shape[dim]:
        return x.amax(dim, keepdim=True)
    return x.new_full((*x.shape[:dim], 1, *x.shape[dim + 1 :]), -torch.inf)
