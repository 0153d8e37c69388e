"""The differentiable collectives of tensor parallelism, in conjugate pairs.

    forward            backward          used where
    copy_to            all-reduce        a replicated activation enters a split region (arXiv 1909.08053, section 3)
    reduce_from        identity          partial results leave it
    gather_to          reduce-scatter    an activation cut along the sequence enters it (arXiv 2205.05198, section 4.2.2)
    scatter_from       all-gather        partial results leave it, to be cut along the sequence
    gather_from        slice             a sharded activation is wanted whole, and all ranks do the same with it
    scatter_to         all-gather        a replicated activation is wanted in parts

All are collective over the axis, in the forward or in the backward, and cost nothing on an axis of size 1. Where ranks
hold copies of one part (`Split.copies`), the gradient of a copy is one addend of the gradient of the part: a gradient
that all ranks know whole is divided among the copies, and one that goes to a replicated tensor adds them up.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_par.runtime.axis import Axis, finest_axis
from lightning_par.runtime.parameter import Split


def copy_to(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``tensor`` itself; its gradient is summed over the axis."""
    return tensor if finest_axis(axis).size == 1 else _Copy.apply(tensor, axis)


def reduce_from(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of ``tensor`` over the axis; its gradient passes unchanged."""
    return tensor if finest_axis(axis).size == 1 else _Reduce.apply(tensor, axis)


def gather_to(tensor: torch.Tensor, axis: Axis, split: Split) -> torch.Tensor:
    """The global tensor from the local shard of ``split``, for a split region: its gradient is summed and sharded."""
    return tensor if axis.size == 1 else _GatherTo.apply(tensor, axis, split)


def scatter_from(tensor: torch.Tensor, axis: Axis, split: Split) -> torch.Tensor:
    """The local shard under ``split`` of the sum of ``tensor`` over the axis; its gradient is gathered."""
    return tensor if axis.size == 1 else _ScatterFrom.apply(tensor, axis, split)


def gather_from(tensor: torch.Tensor, axis: Axis, split: Split) -> torch.Tensor:
    """The global tensor from the local shard of ``split``; its gradient is sliced."""
    return tensor if finest_axis(axis).size == 1 else _Gather.apply(tensor, axis, split)


def scatter_to(tensor: torch.Tensor, axis: Axis, split: Split) -> torch.Tensor:
    """The local shard under ``split`` of a replicated tensor; its gradient is gathered."""
    return tensor if finest_axis(axis).size == 1 else _Scatter.apply(tensor, axis, split)


def addend(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``tensor`` for a computation that all ranks do alike, where its gradients are summed over the axis afterwards."""
    return tensor if axis.size == 1 else _Addend.apply(tensor, axis.size)


def reduce_scatter(tensor: torch.Tensor, axis: Axis, split: Split) -> torch.Tensor:
    """The local shard of the sum of ``tensor`` over the axis, without autograd."""
    shard, wait = axis.begin_reduce_scatter(split.shards(tensor, axis.size))
    wait()
    return shard


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = finest_axis(axis)
        return tensor.detach()  # not a view: a view would keep its base alive

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous().clone()  # autograd may share this buffer with another branch
        ctx.axis.all_reduce(grad)
        return grad, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.copies = axis.copies
        total = tensor.contiguous().clone()
        axis.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad if ctx.copies == 1 else grad / ctx.copies, None


class _GatherTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, split: Split) -> torch.Tensor:
        ctx.axis, ctx.split = axis, split
        return split.unshard(axis.all_gather(tensor))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return reduce_scatter(grad, ctx.axis, ctx.split), None, None


class _ScatterFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, split: Split) -> torch.Tensor:
        ctx.axis, ctx.split = axis, split
        return reduce_scatter(tensor, axis, split)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.split.unshard(ctx.axis.all_gather(grad)), None, None


class _Addend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, size: int) -> torch.Tensor:
        ctx.size = size
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad / ctx.size, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, split: Split) -> torch.Tensor:
        ctx.axis, ctx.split = finest_axis(axis), split
        return split.unshard(ctx.axis.all_gather(tensor))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.split.shard(grad, ctx.axis.size, ctx.axis.coordinate, is_total=True), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, split: Split) -> torch.Tensor:
        ctx.axis, ctx.split = finest_axis(axis), split
        return split.shard(tensor, ctx.axis.size, ctx.axis.coordinate)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.split.unshard(ctx.axis.all_gather(grad), is_total=False), None, None
