"""The way of one activation into the column layers that read it, and of its gradient back.

All readers of a tensor share one gradient reduction (query, key and value need one all-reduce, not three), and it runs
while their weight gradients are computed.

[Note: overlap] Of the nodes that are ready, autograd runs the one that the forward made last. So the forward makes them
in the reverse of the order in which the backward is to run them::

    forward    x -> _Await -> _WeightGradient of each reader -> _Enter -> product of each reader
    backward   products: gradient of x, a matrix product each
               _Enter: begins to sum it over the axis
               _WeightGradient: the gradient of each weight, a matrix product each, meanwhile
               _Await: waits for the sum, then the gradient goes on

Only the product is on the way of the gradient of x; it leaves what the weight gradient needs in a `_Handle`. Where weight
gradients are left for later (`lightning_par.runtime.deferral`), `_WeightGradient` only notes it, and nothing runs meanwhile.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_par.runtime.arithmetic import AS_GIVEN, Arithmetic
from lightning_par.runtime.axis import Axis, Wait
from lightning_par.runtime.collective import gather_to
from lightning_par.runtime.deferral import DeferredGradients, Note
from lightning_par.runtime.parameter import Split
from lightning_par.tensor.deferred import can_defer, deferred_linear
from lightning_par.tensor.sharded import ShardedTensor


class SharedInput:
    """The column layers that read one tensor.

    The first reader makes the entrance; the others read the same result. It is held until all have read it, or until
    the tensor is gone (a forward that was left by an exception).
    """

    def __init__(self) -> None:
        self._readers: list[weakref.ref[nn.Module]] = []
        self._opened: _Opened | None = None

    def add(self, reader: nn.Module) -> None:
        """Count ``reader``, with the attributes of a linear layer, among those that read the tensor in each forward."""
        self._readers.append(weakref.ref(reader))

    def read(self, reader: nn.Module, tensor: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, _Handle | None]:
        """The whole ``tensor``, its gradient summed over the axis once for all readers.

        Args:
            reader: the layer that reads.
            tensor: replicated; or cut along another dim than the last, which is gathered, and its gradient scattered.
            axis: the tp axis. Collective over it where the tensor is cut, and in the backward.

        Returns:
            With the handle through which `product` hands over the reader's weight gradient, where it has one.
        """
        opened = self._opened
        if opened is None or opened.source() is not tensor:
            entered, handles = _open(tensor, axis, [found for known in self._readers if (found := known()) is not None])
            if entered is tensor:
                return tensor, None
            self._opened = opened = _Opened(weakref.ref(tensor, self._forget), entered, handles)
        opened.num_reads += 1
        if opened.num_reads >= len(self._readers):
            self._opened = None
        return opened.entered, opened.handles.pop(id(reader), None)

    def _forget(self, source: weakref.ref[torch.Tensor]) -> None:
        """Drop what was opened, unless it is by now of another tensor."""
        if self._opened is not None and self._opened.source is source:
            self._opened = None


@dataclass
class _Opened:
    source: weakref.ref[torch.Tensor]
    entered: torch.Tensor
    handles: dict[int, _Handle]
    num_reads: int = 0


@dataclass
class _Handle:
    """What a product leaves for its weight gradient: its input and the gradient of its output."""

    node: torch.Tensor = field(init=False)
    left: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass
class _Pending:
    wait: Wait | None = None


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    handle: _Handle | None,
    deferred: DeferredGradients | None,
    arithmetic: Arithmetic = AS_GIVEN,
) -> torch.Tensor:
    """``x [..., in]`` times a weight ``[out, in]`` (``[in, out]`` if transposed) plus bias: ``[..., out]``.

    Args:
        x: the activation.
        weight, bias: local parts of a layer.
        transposed: how the weight lies.
        handle: what `SharedInput.read` gave with ``x``; None computes as torch does.
        deferred: where weight gradients may be left for later.
        arithmetic: how to multiply.
    """
    if handle is None:
        if deferred is not None and not can_defer(x, weight, bias):
            deferred = None
        if deferred is not None or arithmetic is not AS_GIVEN:
            return deferred_linear(x, weight, bias, transposed, deferred, arithmetic)
        return nn.functional.linear(x, weight.t() if transposed else weight, bias)
    node = handle.node
    del handle.node  # the graph holds it, and it would hold the graph in a circle, with all that a block keeps
    return _Product.apply(x, weight.detach(), None if bias is None else bias.detach(), node, handle, transposed, arithmetic)


def _open(tensor: torch.Tensor, axis: Axis, readers: list[nn.Module]) -> tuple[torch.Tensor, dict[int, _Handle]]:
    local, cut = (tensor.local, tensor.cut) if isinstance(tensor, ShardedTensor) else (tensor, None)
    if axis.size == 1 or not (torch.is_grad_enabled() and local.requires_grad):
        return local if cut is None else gather_to(local, axis, cut), {}
    pending = _Pending()
    awaited = _Await.apply(local, pending)
    handles = {id(reader): _make_handle(reader, local) for reader in readers if _has_weight_gradient(reader)}
    return _Enter.apply(awaited, axis, cut, pending), handles


def _has_weight_gradient(reader: Any) -> bool:
    """Under ZeRO-3 the weight of a later reader is empty at the time."""
    return bool(reader.weight.requires_grad and reader.weight.numel() and (reader.bias is None or reader.bias.requires_grad))


def _make_handle(reader: Any, x: torch.Tensor) -> _Handle:
    handle, deferred, arithmetic = _Handle(), reader.record.deferred, reader.record.arithmetic
    if deferred is not None and not can_defer(x, reader.weight, reader.bias):
        deferred = None
    handle.node = _WeightGradient.apply(reader.weight, reader.bias, reader.record.transposed, handle, deferred, arithmetic)
    return handle


class _Await(torch.autograd.Function):
    """See [Note: overlap]."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, pending: _Pending) -> torch.Tensor:
        ctx.pending = pending
        return tensor.detach()  # not a view: a view would keep its base alive

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert ctx.pending.wait is not None
        ctx.pending.wait()
        ctx.pending.wait = None
        return grad, None


class _Enter(torch.autograd.Function):
    """See [Note: overlap]."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: Axis, cut: Split | None, pending: _Pending) -> torch.Tensor:
        ctx.axis, ctx.cut, ctx.pending = axis, cut, pending
        return tensor.detach() if cut is None else cut.unshard(axis.all_gather(tensor))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        axis, cut, pending = ctx.axis, ctx.cut, ctx.pending
        if cut is None:
            grad = grad.contiguous().clone()  # autograd may share this buffer with another branch
            pending.wait = axis.begin_all_reduce(grad)
        else:
            grad, pending.wait = axis.begin_reduce_scatter(cut.shards(grad, axis.size))
        return grad, None, None, None


class _WeightGradient(torch.autograd.Function):
    """See [Note: overlap]. Its output carries no value, it only ties the product to the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        transposed: bool,
        handle: _Handle,
        deferred: DeferredGradients | None,
        arithmetic: Arithmetic,
    ) -> torch.Tensor:
        ctx.weight, ctx.bias, ctx.transposed, ctx.handle, ctx.deferred = weight, bias, transposed, handle, deferred
        ctx.arithmetic = arithmetic
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert ctx.handle.left is not None
        (x, y), ctx.handle.left = ctx.handle.left, None
        note = Note(ctx.weight, ctx.bias, x, y, ctx.transposed, ctx.arithmetic)
        if ctx.deferred is not None and ctx.deferred.is_collecting:
            ctx.deferred.note(note)
            return None, None, None, None, None, None
        return *note.gradients(), None, None, None, None


class _Product(torch.autograd.Function):
    """See [Note: overlap]. Computes in the dtype of autocast, as ``linear`` does; autograd casts its gradients back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        node: torch.Tensor,
        handle: _Handle,
        transposed: bool,
        arithmetic: Arithmetic,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.save_for_backward(x, weight)  # and not what it is cast to, of which each microbatch in flight would keep one
        ctx.handle, ctx.transposed, ctx.arithmetic = handle, transposed, arithmetic
        weight = weight.to(x.dtype)
        y = arithmetic.output(x, weight.t() if transposed else weight, bias if bias is None else bias.to(x.dtype))
        return y.detach()  # with a bias it is a view, which code that goes on in place could not change

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.handle.left, weight = (x, grad), weight.to(x.dtype)
        of_x = ctx.arithmetic.input_gradient(grad, weight.t() if ctx.transposed else weight)
        return of_x, None, None, grad.new_zeros(()), None, None, None
