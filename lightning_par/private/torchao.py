"""Every private name of torchao that this package relies on, with the reason. Read in torchao 0.18.

torchao's own Float8Linear computes the output and both gradients in one autograd function. Here these are apart: over tp the sum
of the input's gradient runs beside the weight's, and a schedule may put the weight's off. So its casts are called one by one,
except for a layer that is whole and inside a graph of torch.compile, which is the autograd function's.
"""

from __future__ import annotations

from typing import Any

import torch
from torchao.float8.config import CastConfig, Float8LinearConfig, ScalingType
from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
from torchao.float8.float8_scaling_utils import get_maybe_axiswise_dim, hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import GemmInputRole, LinearMMConfig, ScaledMMConfig


class Float8Casts:
    """The casts to float8 before each product of a linear layer, by one of torchao's recipes.

    Args:
        recipe: ``tensorwise`` or ``rowwise``, see ``torchao.float8.Float8LinearRecipeName``.
        emulate: multiply in the operands' own dtype, after the cast to float8 and back: on devices that have no such units.
    """

    def __init__(self, recipe: str, emulate: bool) -> None:
        self._config = config = Float8LinearConfig.from_recipe_name(recipe)
        products = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
        # inner dims are padded to the 16 that the units need: the number of tokens may be any
        self._products = LinearMMConfig(*(ScaledMMConfig(emulate, product.use_fast_accum, False, True) for product in products))

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``x [..., in]`` times a weight ``[out, in]``, as torchao's own layer does it, with its gradients."""
        y: torch.Tensor = matmul_with_hp_or_float8_args.apply(x, weight.t(), self._products, self._config)
        return y

    def input(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Of the layer's input. The scale of a row-wise cast is one for all elements along ``dim``, that of the sum."""
        chosen = self._config.cast_config_input if dim == -1 else self._config.cast_config_input_for_grad_weight
        return self._cast(x, chosen, GemmInputRole.INPUT, dim)

    def weight(self, weight: torch.Tensor, dim: int) -> torch.Tensor:
        """Of a weight, transposed as the product reads it."""
        chosen = self._config.cast_config_weight if dim == 0 else self._config.cast_config_weight_for_grad_input
        return self._cast(weight, chosen, GemmInputRole.WEIGHT, dim)

    def gradient(self, y: torch.Tensor, dim: int) -> torch.Tensor:
        """Of the gradient of the layer's output."""
        chosen = self._config.cast_config_grad_output if dim == -1 else self._config.cast_config_grad_output_for_grad_weight
        return self._cast(y, chosen, GemmInputRole.GRAD_OUTPUT, dim)

    def _cast(self, tensor: torch.Tensor, chosen: CastConfig | None, role: Any, dim: int) -> torch.Tensor:
        assert chosen is not None and chosen.scaling_type is ScalingType.DYNAMIC
        cast: torch.Tensor = hp_tensor_to_float8_dynamic(
            tensor,
            chosen.target_dtype,
            self._products,
            gemm_input_role=role,
            scaling_granularity=chosen.scaling_granularity,
            axiswise_dim=get_maybe_axiswise_dim(dim, chosen.scaling_granularity),
            round_scales_to_power_of_2=self._config.round_scales_to_power_of_2,
        )
        return cast
