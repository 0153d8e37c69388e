"""What autograd saves of a weight that stage 3 has gathered: which part of which parameter it is.

``nn.functional.linear`` saves a view, ``weight.t()``. It would hold the memory of the gathered weight until the backward, so that
after a forward all weights of the rank are there at once, released or not. Instead the backward makes the view again, of the
parameter as the hooks of its module have gathered it by then; where none has, it is gathered there and then. What autocast makes
of a weight is made again too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_par.private.saved import Part, cast_parameter, saving
from lightning_par.private.torch import place_of, storage_key


class GatheredWeights:
    """The parameters that stage 3 has gathered, by their memory.

    Args:
        coordinator: who gathers the parameters of a module before its forward and its backward.
        parameters_of: what it gathers then.
        arrive: waits for a parameter that is being gathered.
    """

    def __init__(
        self,
        coordinator: Any,
        parameters_of: Callable[[nn.Module], Iterable[nn.Parameter]],
        arrive: Callable[[nn.Parameter], None],
    ) -> None:
        self._arrive = arrive
        self._by_storage: dict[int, Any] = {}  # where parameters were when they were last gathered; most have gone from there
        self._late: list[Any] = []  # gathered by a backward
        fetch = coordinator.fetch_sub_module

        def fetch_and_note(module: nn.Module, forward: bool) -> None:
            fetch(module, forward=forward)
            self._by_storage.update({storage_key(parameter): parameter for parameter in parameters_of(module)})

        coordinator.fetch_sub_module = fetch_and_note

    def saving(self) -> AbstractContextManager[object]:
        """Inside, no graph holds a gathered weight."""
        return saving(self._pack)

    def forget(self) -> None:
        """After a forward: what it had gathered has gone, or stays until the step."""
        self._by_storage.clear()

    def gather(self, parameter: Any) -> Tensor:
        """A parameter's whole values, in a backward; gathered if it is not. Collective over dp then.

        Every dp rank runs the same graph, and so gathers in the same order.
        """
        if not _is_whole(parameter):
            with torch.no_grad():
                if parameter.ds_status.name == "INFLIGHT":
                    self._arrive(parameter)
                else:
                    parameter.all_gather()
            assert _is_whole(parameter), f"{parameter.ds_summary()} is not there for its backward"
            self._late.append(parameter)
        values: Tensor = parameter.data
        return values

    def release(self) -> None:
        """After a backward: release what it had gathered itself."""
        for parameter in self._late:
            if _is_whole(parameter) and not parameter.ds_active_sub_modules:
                parameter.partition()
        self._late.clear()

    def _pack(self, tensor: Tensor) -> Part | None:
        place = place_of(tensor)
        if place is None:
            return None
        key, start, shape, strides = place
        parameter = self._at(key)
        if parameter is not None:
            start -= parameter.storage_offset()
            is_like = tensor.dtype == parameter.dtype
        else:  # a cast of one lies elsewhere
            cast = cast_parameter(tensor)
            parameter = None if cast is None else self._at(storage_key(cast))
            is_like = parameter is not None
        end = start + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if not is_like or start < 0 or end >= parameter.numel():
            return None
        return Part(partial(self.gather, parameter), start, shape, strides, tensor.dtype)

    def _at(self, key: int) -> Any:
        """The gathered parameter on a storage; None where there is none."""
        parameter = self._by_storage.get(key)
        return parameter if parameter is not None and _is_whole(parameter) and storage_key(parameter) == key else None


def _is_whole(parameter: Any) -> bool:
    is_available: bool = parameter.ds_status.name == "AVAILABLE"
    return is_available
