"""The four differentiable collectives of tensor parallelism, in conjugate pairs (arXiv 1909.08053, section 3).

    forward            backward          used where
    copy_to            all-reduce        a replicated activation enters a split region
    reduce_from        identity          partial results leave it
    gather_from        slice             a sharded activation is wanted whole
    scatter_to         all-gather        a replicated activation is wanted in parts

All are collective over the axis, in the forward or in the backward, and cost nothing on an axis of size 1.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_par.runtime.axis import Axis
from lightning_par.runtime.parameter import Split


def copy_to(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``tensor`` itself; its gradient is summed over the axis."""
    return tensor if axis.size == 1 else _Copy.apply(tensor, axis)


def reduce_from(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of ``tensor`` over the axis; its gradient passes unchanged."""
    return tensor if axis.size == 1 else _Reduce.apply(tensor, axis)


def gather_from(tensor: torch.Tensor, axis: Axis, split: Split) -> torch.Tensor:
    """The global tensor from the local shard of ``split``; its gradient is sliced."""
    return tensor if axis.size == 1 else _Gather.apply(tensor, axis, split)


def scatter_to(tensor: torch.Tensor, axis: Axis, split: Split) -> torch.Tensor:
    """The local shard under ``split`` of a replicated tensor; its gradient is gathered."""
    return tensor if axis.size == 1 else _Scatter.apply(tensor, axis, split)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return tensor.detach()  # not a view: a view would keep its base alive

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous().clone()  # autograd may share this buffer with another branch
        ctx.axis.all_reduce(grad)
        return grad, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        total = tensor.contiguous().clone()
        axis.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, split: Split) -> torch.Tensor:
        ctx.axis, ctx.split = axis, split
        return split.unshard(axis.all_gather(tensor))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.split.shard(grad, ctx.axis.size, ctx.axis.coordinate), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, split: Split) -> torch.Tensor:
        ctx.axis, ctx.split = axis, split
        return split.shard(tensor, axis.size, axis.coordinate)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.split.unshard(ctx.axis.all_gather(grad)), None, None
