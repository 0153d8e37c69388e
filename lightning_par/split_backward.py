"""A module whose schedule splits the backward: layers leave their weight gradient for later while an action I runs.

    split over tp    column, row and vocabulary-parallel layers, the head among them
    whole            ``nn.Linear`` and transformers' ``Conv1D``

A whole layer whose class has a forward of its own stays as it is: its weight gradient is computed in action I. All run as
written between the graphs of compiled blocks, because a compiled graph gives its gradients at once. How a gradient is left is in
`lightning_par.runtime.deferral`.
"""

from __future__ import annotations

from torch import nn

from lightning_par.runtime.deferral import DeferredGradients
from lightning_par.tensor.parallel_class import ParallelLayer
from lightning_par.tensor.whole_linear import change_linear


def defer_weight_gradients(module: nn.Module, deferred: DeferredGradients) -> None:
    """Let every linear layer of ``module`` leave its weight gradient with ``deferred``, in place. Not a collective.

    To be done when the layers that are split over tp have been converted, and before anything is compiled.
    """
    for child in module.modules():
        weight = child._parameters.get("weight")
        if isinstance(child, ParallelLayer) or (weight is not None and weight.requires_grad):
            change_linear(child, deferred=deferred)
