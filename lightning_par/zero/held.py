"""What a rank keeps of each parameter, as flat pieces: what checkpoints are made of and filled from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_par.errors import CheckpointError

WEIGHT = "weight"  # the most exact values of a parameter that there are: the float32 master, where there is one


class Held(NamedTuple):
    """A flat piece of one tensor that is kept for a parameter.

    Attributes:
        parameter: whose.
        key: which tensor: `WEIGHT`, or the optimizer's name of a state, such as ``exp_avg``.
        values: the piece, live and flat.
        start: where it begins in the parameter's local tensor, read flat.
        is_shared: whether every dp rank holds the same piece.
    """

    parameter: nn.Parameter
    key: str
    values: Tensor
    start: int
    is_shared: bool


class Source(Protocol):
    """A checkpoint, asked by who owns the states."""

    def fill(self, held: Held) -> None:
        """Overwrite ``held.values``.

        Raises:
            CheckpointError: the checkpoint has no such values, or they are damaged.
        """

    def states_of(self, parameter: nn.Parameter) -> Mapping[str, torch.dtype]:
        """What there is for each element of a parameter beside the weight, by the optimizer's names."""

    def numbers_of(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """What there is for a parameter as a whole, such as ``step``."""


def is_elementwise(key: str, value: Any, like: Tensor) -> bool:
    """Whether an optimizer's state has a number for each element of what it steps.

    Args:
        key: the optimizer's name of it.
        value: the state.
        like: what is stepped. One without dims has as many elements as a step count.
    """
    return isinstance(value, Tensor) and value.shape == like.shape and key != "step"


def fill_tensor(source: Source, parameter: nn.Parameter, key: str, tensor: Tensor) -> None:
    """Overwrite a whole local tensor, of any strides."""
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.new_empty(tensor.numel())
    source.fill(Held(parameter, key, flat, 0, is_shared=True))
    if not tensor.is_contiguous():
        tensor.copy_(flat.view(tensor.shape))


def placed(key: str, value: Any, like: Tensor, group: Mapping[str, Any]) -> Any:
    """A copy of a loaded state of a whole parameter, where the optimizer reads it.

    Step counts stay on the CPU unless the kernel reads them, as in torch.

    Args:
        key: the optimizer's name of it.
        value: the state.
        like: what is stepped.
        group: the options of the parameter's group.
    """
    if not isinstance(value, Tensor):
        return value
    is_on_device = key != "step" or group.get("fused") or group.get("capturable")
    return value.to(like.device, copy=True) if is_on_device else value.clone()


def agreed(numbers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What parameters that are stepped as one have as a whole; each must have the same, or nothing.

    Args:
        numbers: by the name of the parameter.

    Raises:
        CheckpointError: they differ.
    """
    found: dict[str, tuple[str, Any]] = {}
    for name, values in numbers.items():
        for key, value in values.items():
            first, other = found.setdefault(key, (name, value))
            if not _is_equal(value, other):
                raise CheckpointError(
                    f"the checkpoint has {key}={_shown(other)} for {first} and {key}={_shown(value)} for {name}, and ZeRO steps "
                    "them as one: resume with zero0"
                )
    return {key: value for key, (_, value) in found.items()}


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _shown(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
