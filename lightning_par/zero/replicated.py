"""ZeRO stage 0: every replica holds and steps everything, with the user's own torch optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_par.runtime.axis import Axis
from lightning_par.runtime.nested import tensors_in
from lightning_par.zero.bucket import sum_gradients
from lightning_par.zero.held import WEIGHT, Held, Source, fill_tensor, is_elementwise, placed
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
        masters = [stepped.detach() for p in parameters if (stepped := self._stepped(p)) is not p]
        return Stored([parameter.detach() for parameter in parameters], gradients, masters + states)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            yield name, parameter.detach()

    def weights(self) -> Iterator[Held]:
        for parameter in self.module.parameters():
            yield Held(parameter, WEIGHT, parameter.detach().reshape(-1), 0, is_shared=True)

    def held(self) -> Iterator[Held]:
        for parameter in self.module.parameters():
            stepped = self._stepped(parameter)
            yield Held(parameter, WEIGHT, stepped.detach().reshape(-1), 0, is_shared=True)
            for key, value in self._states_of(parameter).items():
                if is_elementwise(_name_of(key), value, stepped):
                    yield Held(parameter, key, value.detach().reshape(-1), 0, is_shared=True)

    def numbers(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        for parameter in self.module.parameters():
            states, stepped = self._states_of(parameter), self._stepped(parameter)
            numbers = {key: value for key, value in states.items() if not is_elementwise(_name_of(key), value, stepped)}
            if numbers:
                yield parameter, numbers

    @torch.no_grad()
    def refill(self, source: Source) -> None:
        for parameter in self.module.parameters():
            stepped = self._stepped(parameter)
            fill_tensor(source, parameter, WEIGHT, stepped)
            if stepped is not parameter:
                parameter.copy_(stepped)
        for index, optimizer in enumerate(self.optimizers):
            state: Any = self._stepper(optimizer).state
            state.clear()
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    loaded = self._loaded(source, parameter, index, group)
                    if loaded:
                        state[self._stepped(parameter)] = loaded

    def _loaded(self, source: Source, parameter: nn.Parameter, index: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """The states that an optimizer, by its position, has for a parameter in the source."""
        stepped, loaded = self._stepped(parameter), {}
        for key, dtype in source.states_of(parameter).items():
            if _position_in(key) == index:
                loaded[_name_of(key)] = torch.zeros_like(stepped, dtype=dtype)
                fill_tensor(source, parameter, key, loaded[_name_of(key)])
        for key, value in source.numbers_of(parameter).items():
            if _position_in(key) == index:
                loaded[_name_of(key)] = placed(_name_of(key), value, stepped, group)
        return loaded

    def _states_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What all optimizers keep for a parameter; those of the second and later ones have its position in their names."""
        stepped: Any = self._stepped(parameter)
        found = {}
        for index, optimizer in enumerate(self.optimizers):
            states: Mapping[str, Any] = self._stepper(optimizer).state.get(stepped, {})
            found.update({f"{index}:{key}" if index else key: value for key, value in states.items()})
        return found

    def _stepped(self, parameter: nn.Parameter) -> Tensor:
        """The master of a parameter, the very object that is stepped; the parameter itself where it has none."""
        found = (masters.stepped(parameter) for masters in self._masters.values())
        return next((master for master in found if master is not None), parameter)

    def close(self) -> None:
        """Nothing to free."""

    def dissolve(self) -> None:
        """Nothing to restore."""

    def _stepper(self, optimizer: Optimizer) -> Optimizer | Masters:
        """What steps for one of the optimizers."""
        return self._masters.get(optimizer, optimizer)

    def _chosen(self, optimizer: Optimizer | None) -> Sequence[Optimizer]:
        return self.optimizers if optimizer is None else (optimizer,)

    def _trainable(self, optimizer: Optimizer | None) -> list[nn.Parameter]:
        """Parameters of the optimizers that can have a gradient, each once, in an order that all dp ranks share."""
        groups = [group for each in self._chosen(optimizer) for group in each.param_groups]
        return list(dict.fromkeys(p for group in groups for p in group["params"] if p.requires_grad))


def _position_in(key: str) -> int:
    """Which optimizer's state it is."""
    return int(key.partition(":")[0]) if ":" in key else 0


def _name_of(key: str) -> str:
    """What the optimizer calls it."""
    return key.rpartition(":")[2]
