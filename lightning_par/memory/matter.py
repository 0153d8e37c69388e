"""What the tensors of an imagined rank are: fakes without memory, or real ones on a device, whose values are random."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from lightning_par.materialize import is_deferred, whole_value
from lightning_par.pipeline.transport import Like
from lightning_par.private.torch import FakeTensorMode
from lightning_par.runtime.precision import Precision
from lightning_par.trace.tracer import fake_of

_SPREAD = 0.02  # of random weights: activations stay of the size that they have in a training


class Matter(ABC):
    """Makes the tensors of a rank.

    Attributes:
        device: where the rank computes.
    """

    def __init__(self, device: torch.device, precision: Precision) -> None:
        self.device, self._precision = device, precision

    @abstractmethod
    def state(self, tensor: torch.Tensor) -> torch.Tensor:
        """For a parameter or buffer of the user's module, one of the copy that the rank's part is made of."""

    @abstractmethod
    def given(self, tensor: torch.Tensor) -> torch.Tensor:
        """For a tensor of the user's batch, one of the rank's."""

    @abstractmethod
    def received(self, like: Like) -> torch.Tensor:
        """What another stage has sent."""

    @abstractmethod
    def settle(self, module: nn.Module) -> None:
        """Give the parameters and buffers that the installed part has left what they need to run, in place."""


class Fakes(Matter):
    """Fake tensors, for use inside ``fake``."""

    def __init__(self, fake: FakeTensorMode, precision: Precision) -> None:
        super().__init__(torch.device("cpu"), precision)
        self._fake = fake

    def state(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._precision.convert(fake_of(self._fake, tensor))

    def given(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._fake.from_tensor(tensor.detach())

    def received(self, like: Like) -> torch.Tensor:
        shape, dtype = like
        return torch.empty(shape, dtype=dtype)

    def settle(self, module: nn.Module) -> None:
        """They run as they are."""


class Solids(Matter):
    """Real tensors: the user's buffers and batch, random weights and hidden states, whole numbers that are valid as indices.

    A module may be larger than this host: its parameters are memory that nothing has touched, and only what a rank keeps of them
    gets values.
    """

    def state(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            return self._precision.convert(whole_value(tensor) if is_deferred(tensor) else tensor.detach().clone())
        untouched = torch.empty_strided(tensor.shape, tensor.stride(), dtype=self._precision.dtype_of(tensor))
        return nn.Parameter(untouched, tensor.requires_grad)

    def given(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(self.device)

    def received(self, like: Like) -> torch.Tensor:
        shape, dtype = like
        values = torch.randn if dtype.is_floating_point else torch.zeros
        return values(shape, device=self.device).to(dtype)

    @torch.no_grad()
    def settle(self, module: nn.Module) -> None:
        module.to(self.device)
        for parameter in module.parameters():
            parameter.normal_(0, _SPREAD) if parameter.is_floating_point() else parameter.zero_()
