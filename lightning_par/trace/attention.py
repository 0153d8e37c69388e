"""Fused attention's floating-point operations where torch counts none: on a CPU, where dry runs are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten


class Attention(NamedTuple):
    """How an operator is counted.

    Attributes:
        count: its operations, from shapes.
        first: where among its arguments the tensors with these shapes begin.
        num_shapes: how many they are.
        causal: where ``is_causal`` stands.
    """

    count: Callable[..., int]
    first: int
    num_shapes: int
    causal: int

    def flops(self, shapes: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[float, float]:
        """With causal attention counted half, and whole.

        Args:
            shapes: of the arguments that have them.
            args, kwargs: of the call.
        """
        whole = float(self.count(*shapes))
        is_causal = args[self.causal] if len(args) > self.causal else kwargs.get("is_causal", False)
        return whole / 2 if is_causal else whole, whole


ATTENTION: Mapping[Any, Attention] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: Attention(sdpa_flop_count, 0, 3, 4),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: Attention(sdpa_backward_flop_count, 0, 4, 7),
}


class AttentionFlops:
    """Adds up fused attention beside a ``FlopCounterMode``, which goes on counting it as nothing.

    Attributes:
        causal, whole: operations so far, with causal attention counted half, and whole.
    """

    def __init__(self) -> None:
        self.causal = self.whole = 0.0

    @property
    def mapping(self) -> dict[Any, Callable[..., int]]:
        """For ``FlopCounterMode(custom_mapping=...)``."""
        return {operator: partial(self._add, attention) for operator, attention in ATTENTION.items()}

    def _add(self, attention: Attention, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        """Called with shapes in the place of tensors."""
        causal, whole = attention.flops(args[attention.first : attention.first + attention.num_shapes], args, kwargs)
        self.causal, self.whole = self.causal + causal, self.whole + whole
        return 0
