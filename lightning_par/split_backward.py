"""Layers that leave their weight gradient for later while an action I runs (`lightning_par.runtime.deferral`).

    split over tp    column, row and vocabulary-parallel layers, the head among them, have it in their record
    whole            ``nn.Linear`` and transformers' ``Conv1D`` change their class in place

A whole layer whose class has a forward of its own stays as it is: its weight gradient is computed in action I. All run as
written between the graphs of compiled blocks, because a compiled graph gives its gradients at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_par.private.torch import runs_as_written
from lightning_par.runtime.deferral import DeferredGradients
from lightning_par.tensor.deferred import can_defer, deferred_linear
from lightning_par.tensor.linear import LinearRecord, linear_base
from lightning_par.tensor.parallel_class import ParallelLayer, convert, set_record
from lightning_par.trace.description import layer_kind


@dataclass(frozen=True)
class DeferredRecord:
    """How a whole layer computes.

    Attributes:
        transposed: the weight is ``[in, out]``.
        deferred: where its weight gradient may be left.
    """

    transposed: bool
    deferred: DeferredGradients

    def describe(self, module: nn.Module) -> str:
        return "weight gradient apart"

    def __deepcopy__(self, memo: dict[int, Any]) -> DeferredRecord:
        return self  # a copy of the module leaves its gradients at the same place


class DeferredLinear(ParallelLayer):
    """A whole linear layer."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    @runs_as_written
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, as the layer itself."""
        record: DeferredRecord = self.record
        weight, bias = self.weight, self.bias
        if not can_defer(input, weight, bias):
            output: torch.Tensor = super().forward(input)
            return output
        return deferred_linear(input, weight, bias, record.transposed, record.deferred)


def defer_weight_gradients(module: nn.Module, deferred: DeferredGradients) -> None:
    """Let every linear layer of ``module`` leave its weight gradient with ``deferred``, in place. Not a collective.

    To be done when the layers that are split over tp have been converted, and before anything is compiled.
    """
    for child in module.modules():
        base = linear_base(type(child))
        if base is None:
            continue
        if isinstance(child, ParallelLayer):
            record: LinearRecord = child.record
            set_record(child, replace(record, deferred=deferred))
        elif layer_kind(child) is not None and child.weight.requires_grad and _runs_forward_of(base, child):
            convert(child, base, DeferredLinear, DeferredRecord(base is not nn.Linear, deferred))


def _runs_forward_of(base: type[nn.Module], child: nn.Module) -> bool:
    return type(child).forward is base.forward and "forward" not in vars(child)
