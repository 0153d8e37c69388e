"""ZeRO stage 0: every replica holds and steps everything, with the user's own torch optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_par.errors import CheckpointError
from lightning_par.runtime.axis import Axis
from lightning_par.runtime.nested import tensors_in
from lightning_par.zero.bucket import sum_gradients
from lightning_par.zero.masters import Masters
from lightning_par.zero.states import Fragment, OptimizerStates, Stored


class ReplicatedStates(OptimizerStates):
    """Plain torch optimizers; gradients are averaged over dp in buckets. Imports no DeepSpeed.

    Args:
        module: the module on this rank.
        optimizers: one or several (manual optimization), over parameters of ``module``.
        dp: the data-parallel axis; with size 1 nothing is ever sent.
        has_masters: whether float32 copies of half-precision parameters are stepped.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer], dp: Axis, has_masters: bool = False) -> None:
        super().__init__(module, optimizers)
        self.dp = dp
        self._masters = {optimizer: Masters(optimizer) for optimizer in self.optimizers if has_masters}

    def accumulate(self) -> AbstractContextManager[None]:
        return nullcontext()

    def evaluate(self) -> AbstractContextManager[None]:
        return nullcontext()

    def after_forward(self) -> None:
        """Nothing to settle."""

    def after_backward(self) -> None:
        """Nothing to release."""

    def reduce(self, optimizer: Optimizer | None = None) -> None:
        parameters = self._trainable(optimizer)
        sum_gradients(parameters, [tuple(p.shape) for p in parameters], self.dp, scale=1 / self.dp.size)

    def gradients(self, optimizer: Optimizer | None = None) -> Iterator[Fragment]:
        for parameter in self._trainable(optimizer):
            if parameter.grad is not None:
                yield Fragment(parameter.grad, parameter, 0, self.dp.coordinate == 0)

    def step(self, optimizer: Optimizer | None = None) -> None:
        for each in self._chosen(optimizer):
            self._stepper(each).step()

    def zero_grad(self, optimizer: Optimizer | None = None) -> None:
        for each in self._chosen(optimizer):
            each.zero_grad()

    def stored(self) -> Stored:
        parameters = list(self.module.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        states = [tensor for each in self.optimizers for tensor in tensors_in(list(self._stepper(each).state.values()))]
        masters = [master for _, master in self._named_masters()]
        return Stored([parameter.detach() for parameter in parameters], gradients, masters + states)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield name, parameter.detach()

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameters": dict(self.full_parameters()),
            "masters": dict(self._named_masters()),
            "optimizers": [self._stepper(optimizer).state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = dict(self.module.named_parameters())
        if parameters.keys() != state["parameters"].keys() or len(self.optimizers) != len(state["optimizers"]):
            different = sorted(parameters.keys() ^ state["parameters"].keys())
            raise CheckpointError(
                f"the checkpoint is of another module or layout: parameters on one side only: {different[:5]}, "
                f"{len(state['optimizers'])} optimizers there and {len(self.optimizers)} here"
            )
        values = {**state["parameters"], **state.get("masters", {})}  # masters say more; none were saved without any
        with torch.no_grad():
            for name, tensor in (*parameters.items(), *self._named_masters()):
                tensor.copy_(values[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            self._stepper(optimizer).load_state_dict(saved)

    def close(self) -> None:
        """Nothing to free."""

    def dissolve(self) -> None:
        """Nothing to restore."""

    def _stepper(self, optimizer: Optimizer) -> Optimizer | Masters:
        """What steps for one of the optimizers."""
        return self._masters.get(optimizer, optimizer)

    def _named_masters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            for masters in self._masters.values():
                master = masters.of(parameter)
                if master is not None:
                    yield name, master
                    break

    def _chosen(self, optimizer: Optimizer | None) -> Sequence[Optimizer]:
        return self.optimizers if optimizer is None else (optimizer,)

    def _trainable(self, optimizer: Optimizer | None) -> list[nn.Parameter]:
        """Parameters of the optimizers that can have a gradient, each once, in an order that all dp ranks share."""
        groups = [group for each in self._chosen(optimizer) for group in each.param_groups]
        return list(dict.fromkeys(p for group in groups for p in group["params"] if p.requires_grad))
