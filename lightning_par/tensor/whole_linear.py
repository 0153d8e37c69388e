"""Linear layers that are not split over tp, and compute in another way than torch all the same.

``nn.Linear`` and transformers' ``Conv1D`` change their class in place. A layer whose class has a forward of its own stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_par.private.torch import runs_as_written
from lightning_par.runtime.arithmetic import AS_GIVEN, Arithmetic
from lightning_par.runtime.deferral import DeferredGradients
from lightning_par.tensor.deferred import can_defer
from lightning_par.tensor.entrance import product
from lightning_par.tensor.linear import linear_base
from lightning_par.tensor.parallel_class import ParallelLayer, convert, set_record
from lightning_par.trace.description import layer_kind


@dataclass(frozen=True)
class WholeRecord:
    """How a whole layer computes.

    Attributes:
        transposed: the weight is ``[in, out]``.
        deferred: where its weight gradient may be left for later.
        arithmetic: how it multiplies.
    """

    transposed: bool
    deferred: DeferredGradients | None = None
    arithmetic: Arithmetic = AS_GIVEN

    def describe(self, module: nn.Module) -> str:
        return ", ".join(
            word
            for word, is_so in (("weight gradient apart", self.deferred), (str(self.arithmetic), self.arithmetic is not AS_GIVEN))
            if is_so
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> WholeRecord:
        return self  # a copy of the module leaves its gradients at the same place


class WholeLinear(ParallelLayer):
    """A whole linear layer."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, as the layer itself."""
        record: WholeRecord = self.record
        if record.deferred is not None or not torch.compiler.is_compiling():
            return self._as_written(input)
        weight, bias = self.weight.t() if record.transposed else self.weight, self.bias
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight = input.to(dtype), weight.to(dtype)
        return record.arithmetic.linear(input, weight, bias)

    @runs_as_written
    def _as_written(self, input: torch.Tensor) -> torch.Tensor:
        record: WholeRecord = self.record
        if record.arithmetic is AS_GIVEN and not can_defer(input, self.weight, self.bias):
            output: torch.Tensor = super().forward(input)
            return output
        return product(input, self.weight, self.bias, record.transposed, None, record.deferred, record.arithmetic)


def change_linear(child: nn.Module, **changes: Any) -> None:
    """Have a linear layer, split or whole, compute with other fields of its record, in place."""
    base = linear_base(type(child))
    if base is None:
        return
    if isinstance(child, ParallelLayer):
        set_record(child, replace(child.record, **changes))
    elif layer_kind(child) is not None and _runs_forward_of(base, child):
        convert(child, base, WholeLinear, WholeRecord(base is not nn.Linear, **changes))


def _runs_forward_of(base: type[nn.Module], child: nn.Module) -> bool:
    return type(child).forward is base.forward and "forward" not in vars(child)
