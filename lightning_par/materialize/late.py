"""Parameters that get their memory one after the other, when ZeRO-3 partitions them: no rank ever has all of them at once.

Until then a parameter has its shape, dtype and device, and a storage of no bytes: optimizers are made from such parameters as from
any others. Who touches one nevertheless finds its values there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_par.materialize.module import give_values
from lightning_par.private.torch import TorchDispatchMode, storage_key
from lightning_par.runtime.nested import tensors_in


class LateValues:
    """The parameters of a rank that have no memory yet."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[nn.Parameter, Callable[[torch.Tensor], None]]] = {}

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(self, parameter: nn.Parameter, like: torch.Tensor, name: str, write: Callable[[torch.Tensor], None]) -> None:
        """Turn a deferred parameter into one without memory, in place.

        Args:
            parameter: the parameter.
            like: has the shape, dtype and device that it is going to have; its memory is given back.
            name: for messages.
            write: writes the values into a tensor like that.

        Raises:
            ModelError: a hook on its gradient would be lost.
        """
        like.untyped_storage().resize_(0)
        give_values(parameter, like, name)
        self._waiting[storage_key(parameter)] = parameter, write

    def fill(self, tensor: torch.Tensor) -> None:
        """Give the parameter on a tensor's storage memory and values, if it waits for them."""
        found = self._waiting.pop(storage_key(tensor), None)
        if found is not None:
            parameter, write = found
            parameter.untyped_storage().resize_(parameter.nbytes)
            with torch.no_grad():
                write(parameter.data)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Inside, a parameter is filled before any operation on it; to show a part of it asks for its memory too.

        Where the inside raises, those that still wait become zeros without memory: whoever prints one would crash this process.
        """
        try:
            with _Filling(self):
                yield
        except BaseException:
            for parameter, _ in self._waiting.values():
                parameter.data = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
            self._waiting.clear()
            raise


class _Filling(TorchDispatchMode):
    def __init__(self, late: LateValues) -> None:
        super().__init__()
        self._late = late

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_in([args, kwargs]):
            self._late.fill(tensor)
        return func(*args, **kwargs)
