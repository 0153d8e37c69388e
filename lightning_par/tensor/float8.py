"""Linear layers that multiply in float8 (8-bit floating point, arXiv 2209.05433) by torchao's dynamic scaling.

Each operand is cast just before its product, with a scale from its own greatest element: one for the tensor (``tensorwise``; e4m3,
gradients e5m2) or one for each row (``rowwise``; e4m3, scales are powers of two). What autograd saves, sums over ranks, and
gradients are in the dtype of the operands, as without. Over tp a rank scales its own part of a tensor: with powers of two that
changes no number.

A cast is a dozen small operations, which cost more than the product saves. So each product is compiled with its casts, whether the
block around it is compiled or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lightning_par.errors import ConfigurationError
from lightning_par.private.torch import allow_versions
from lightning_par.runtime.arithmetic import Arithmetic
from lightning_par.tensor.whole_linear import change_linear

_VERSIONS = 64  # of a product: shapes of weights and batches
_CAPABILITY = (9, 0)  # of NVIDIA's Hopper, the first with units for row-wise scales


class Float8Arithmetic(Arithmetic):
    """The products of a linear layer in float8.

    Args:
        recipe: ``tensorwise`` or ``rowwise``.
        emulate: cast as on a device that has float8 units, and multiply without.
        backend: of torch.compile, for the products; None runs them as written.
    """

    def __init__(self, recipe: str, emulate: bool, backend: str | None = None) -> None:
        from lightning_par.private.torchao import Float8Casts  # here: torchao is there only where this is used

        self._recipe, self._casts = recipe, Float8Casts(recipe, emulate)
        products: list[Any] = [self._output, self._input_gradient, self._weight_gradient]
        if backend is not None:
            allow_versions(_VERSIONS)
            # not for any shape at once: those of weights are few, and so are those of batches
            products = [torch.compile(each, backend=backend, dynamic=False) for each in products]
        self._products = products

    def __str__(self) -> str:
        return f"float8 {self._recipe}"

    def output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = self._products[0](x, weight, bias)
        return y

    def input_gradient(self, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gradient: torch.Tensor = self._products[1](y, weight)
        return gradient

    def weight_gradient(self, x: torch.Tensor, y: torch.Tensor, transposed: bool) -> torch.Tensor:
        gradient: torch.Tensor = self._products[2](x, y, transposed)
        return gradient

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = self._casts.linear(x, weight)
        return y if bias is None else y + bias.to(y.dtype)

    def _output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = _over_rows(x, lambda rows: torch.mm(self._casts.input(rows, -1), self._casts.weight(weight.t(), 0)))
        return y if bias is None else y + bias.to(y.dtype)

    def _input_gradient(self, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _over_rows(y, lambda rows: torch.mm(self._casts.gradient(rows, -1), self._casts.weight(weight.t(), -1).t()))

    def _weight_gradient(self, x: torch.Tensor, y: torch.Tensor, transposed: bool) -> torch.Tensor:
        gradient = torch.mm(self._casts.gradient(y, 0).t(), self._casts.input(x, 0))
        return gradient.t().contiguous() if transposed else gradient


def multiply_in_float8(module: nn.Module, layers: Iterable[str], arithmetic: Arithmetic) -> None:
    """Have linear layers, split and whole, multiply in ``arithmetic``, in place. Not a collective.

    Args:
        module: the user's.
        layers: their names.
        arithmetic: a `Float8Arithmetic`.
    """
    for name in layers:
        change_linear(module.get_submodule(name), arithmetic=arithmetic)


def check_float8(recipe: str, device: torch.device, precision: str) -> None:
    """Check that a device multiplies in float8, and that what is beside it is what float8 products give.

    Raises:
        ConfigurationError: it does not, or torchao is missing; says what would do.
    """
    words = f"fp8={recipe}"
    if find_spec("torchao") is None:
        raise ConfigurationError(f"{words} scales by torchao, which is not installed: pip install torchao, or leave fp8 out")
    if not precision.startswith("bf16"):
        raise ConfigurationError(f"{words} with precision={precision}: float8 products give bfloat16: use precision=bf16-mixed")
    if device.type != "cuda" or torch.version.hip is not None:
        raise ConfigurationError(
            f"{words} needs the float8 units of an NVIDIA GPU, and this run is on {device.type}: leave fp8 out here"
        )
    found = torch.cuda.get_device_capability(device)
    if found < _CAPABILITY:
        raise ConfigurationError(
            f"{words} needs an NVIDIA GPU of compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]} or higher (Hopper, Blackwell), "
            f"and {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: leave fp8 out here"
        )


def _over_rows(tensor: torch.Tensor, multiply: Any) -> torch.Tensor:
    """``multiply`` on ``[n, last]`` of a tensor ``[..., last]``."""
    rows: torch.Tensor = multiply(tensor.reshape(-1, tensor.shape[-1]))
    return rows.reshape(*tensor.shape[:-1], rows.shape[-1])
