"""When a module's backward is over in stage 3: counted apart for each of its calls.

DeepSpeed puts an autograd function on each input of a module, and releases the parameters when all of these have passed on their
gradients. It counts them in one attribute of the module, which each call sets anew: of the microbatches that are in flight at once,
only the first backward would release anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Call:
    """One call of a module.

    Attributes:
        num_left: gradients of its inputs that its backward has still to give.
    """

    def __init__(self) -> None:
        self.num_left = 0


def count_calls_apart(module: nn.Module, release: Callable[[nn.Module], None]) -> None:
    """Let ``release(module)`` run at the end of the backward of each call. Not a collective."""

    class AfterBackward(torch.autograd.Function):
        """Identity, on an input."""

        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            ctx.call = _call_of(module)
            ctx.call.num_left += ctx.needs_input_grad[0]
            return tensor.detach()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            ctx.call.num_left -= 1
            if ctx.call.num_left == 0:
                release(module)
            return gradient

    vars(module)["post_bwd_fn"] = AfterBackward


def keep_call(module: nn.Module) -> None:
    """The backward of the last call is not to release anything."""
    _call_of(module).num_left = 2**30


def _call_of(module: nn.Module) -> _Call:
    """The last call; a new one where DeepSpeed has just set the count to 0."""
    attributes = vars(module)
    if not isinstance(attributes.get("ds_grads_remaining"), _Call):
        attributes["ds_grads_remaining"] = _Call()
    call: _Call = attributes["ds_grads_remaining"]
    return call
