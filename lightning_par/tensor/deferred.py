"""A product with a weight whose gradient may be left for later, see `lightning_par.runtime.deferral`, in any arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_par.private.torch import has_gradient_hook, is_gradient_wanted, is_plain
from lightning_par.runtime.arithmetic import AS_GIVEN, Arithmetic
from lightning_par.runtime.deferral import DeferredGradients, Note


def can_defer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether ``x`` times this weight is a product of plain tensors, and its weight gradient one that nobody sees arrive.

    Asked at each forward: users freeze weights and add hooks while they train.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad and is_plain(x)) or x.device.type == "meta":
        return False  # a tensor without memory has no autocast either
    return _is_unwatched(weight) and (bias is None or not bias.requires_grad or _is_unwatched(bias))


def _is_unwatched(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not has_gradient_hook(tensor)  # functional_call puts other tensors in its place


def deferred_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transposed: bool,
    deferred: DeferredGradients | None,
    arithmetic: Arithmetic = AS_GIVEN,
) -> torch.Tensor:
    """``nn.functional.linear``.

    Args:
        x: a plain tensor ``[..., in]``.
        weight: ``[out, in]``, or ``[in, out]`` if transposed.
        bias: ``[out]``.
        transposed: how the weight lies.
        deferred: what the backward leaves the gradients with during an action I, where `can_defer` holds; None where it does not.
        arithmetic: how to multiply.
    """
    dtype = None
    if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
    output: torch.Tensor = _Linear.apply(x, weight, bias, transposed, deferred, dtype, arithmetic)
    return output


class _Linear(torch.autograd.Function):
    """The product. ``dtype`` is what autocast computes in, None without it.

    The weight is cast here: autocast itself would keep what it casts, which has no graph here, for others that read the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        transposed: bool,
        deferred: DeferredGradients | None,
        dtype: torch.dtype | None,
        arithmetic: Arithmetic,
    ) -> torch.Tensor:
        ctx.weight, ctx.bias, ctx.transposed, ctx.deferred, ctx.arithmetic = weight, bias, transposed, deferred, arithmetic
        ctx.save_for_backward(x, weight)  # and not what it is cast to, of which each microbatch in flight would keep one
        w: torch.Tensor = weight if dtype is None else weight.to(dtype)
        b = bias if dtype is None or bias is None else bias.to(dtype)
        y = arithmetic.output(x, w.t() if transposed else w, b)
        return y if bias is None else y.detach()  # it is a view, which code that goes on in place could not change

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight = weight.to(x.dtype)
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        of_x = ctx.arithmetic.input_gradient(grad, weight.t() if ctx.transposed else weight) if needs_x else None
        note = Note(ctx.weight, ctx.bias if needs_bias else None, x, grad, ctx.transposed, ctx.arithmetic)
        if ctx.deferred is not None and ctx.deferred.is_collecting and is_gradient_wanted(ctx, 1):
            ctx.deferred.note(note)
            return of_x, *[None] * 6
        of_weight, of_bias = note.gradients() if needs_weight else (None, note.of_bias())
        return of_x, of_weight, of_bias, *[None] * 4
