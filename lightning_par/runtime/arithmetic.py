"""The three matrix products of a linear layer, and in which arithmetic they run.

    output            y = x w^T + bias
    input gradient    dx = dy w
    weight gradient   dw = dy^T x

Layers that split these over ranks or put one off for later ask an `Arithmetic` for each.
"""

from __future__ import annotations

import torch
from torch import nn


class Arithmetic:
    """The products in the dtype of their operands, as torch runs them. Weights are ``[out, in]``, views of others included."""

    def output(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return nn.functional.linear(x, weight, bias)

    def input_gradient(self, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """From the gradient of the output ``[..., out]`` to that of the input ``[..., in]``."""
        return y @ weight

    def weight_gradient(self, x: torch.Tensor, y: torch.Tensor, transposed: bool) -> torch.Tensor:
        """From ``x [n, in]`` and ``y [n, out]`` to ``[out, in]``, or ``[in, out]`` if transposed."""
        return x.t() @ y if transposed else y.t() @ x

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The output, with both gradients by autograd: for a graph that torch.compile makes of more than this layer."""
        return nn.functional.linear(x, weight, bias)


AS_GIVEN = Arithmetic()
