"""float32 masters of half-precision parameters, where no DeepSpeed keeps them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_par.private.deepspeed import mark_stepped
from lightning_par.zero.twin import twin_of

HALF = (torch.bfloat16, torch.float16)


def accumulate_in_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Let the gradients of half-precision parameters add up in float32.

    Each microbatch's gradient is rounded once, as its backward computes it; a sum of 64 of them in bfloat16 would be off by
    6e-3, measured against float64.
    """
    for parameter in parameters:
        if parameter.requires_grad and parameter.dtype in HALF:
            gradient, parameter.grad = parameter.grad, None  # torch changes the dtype of none
            parameter.grad_dtype = torch.float32
            parameter.grad = None if gradient is None else gradient.float()


class Masters:
    """Steps float32 copies of an optimizer's half-precision parameters by a twin of the optimizer, and publishes them.

    The user's optimizer keeps its groups; their hyperparameters and members are read before each step.

    Args:
        optimizer: the user's.

    Attributes:
        optimizer: the same.
        inner: the twin; it has the states.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.inner = optimizer, twin_of(optimizer, [])
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        self._read_groups()

    @property
    def state(self) -> Any:
        """The states of the optimizer, by master."""
        return self.inner.state

    def step(self) -> None:
        """Step with the gradients of the parameters."""
        self._read_groups()
        for parameter, master in self._masters.items():
            master.grad = parameter.grad
        self.inner.step()
        for master in self._masters.values():
            master.grad = None
        self.publish()
        mark_stepped(self.optimizer)

    @torch.no_grad()
    def publish(self) -> None:
        """Make the parameters what their masters say, rounded."""
        for parameter, master in self._masters.items():
            parameter.copy_(master)

    def stepped(self, parameter: nn.Parameter) -> nn.Parameter | None:
        """The master of a parameter, live; None if it has none."""
        return self._masters.get(parameter)

    def _read_groups(self) -> None:
        groups = self.optimizer.param_groups
        self.inner.param_groups = [{**group, "params": [self._stepped(p) for p in group["params"]]} for group in groups]

    def _stepped(self, parameter: nn.Parameter) -> Any:
        """What is stepped for a parameter: its master, made now if there is none yet; itself, if frozen or in float32."""
        if parameter not in self._masters and parameter.requires_grad and parameter.dtype in HALF:
            accumulate_in_float32([parameter])
            self._masters[parameter] = nn.Parameter(parameter.detach().float())
        return self._masters.get(parameter, parameter)
