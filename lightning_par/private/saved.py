"""Hooks on what autograd saves for the backward, one inside another.

Of several ``torch.autograd.graph.saved_tensors_hooks`` torch calls the innermost alone. Here that one leaves what it has no use for
to the one outside. Under hooks torch gives up two things, and both are made up for here: the graph of a saved result would hold
itself, and nobody would notice that a saved tensor was changed in place before the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


class Saved(Protocol):
    """What autograd keeps in the place of a tensor."""

    def fetch(self) -> torch.Tensor:
        """The tensor, for the backward."""


def saving(pack: Callable[[torch.Tensor], Saved | None]) -> saved_tensors_hooks:
    """Hooks, to be entered at once: autograd keeps what ``pack`` gives for a tensor, and for None what it would keep outside."""
    outside = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack_or_pass_on(tensor: torch.Tensor) -> Saved:
        packed = pack(tensor)
        if packed is not None:
            return packed
        return _Unchanged(tensor) if outside is None else _Outside(tensor, *outside)

    return saved_tensors_hooks(pack_or_pass_on, lambda saved: saved.fetch())


class _Unchanged:
    """The tensor itself."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version  # a result itself would hold its graph, and that the result

    def fetch(self) -> torch.Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of shape "
                f"{list(self._tensor.shape)} is at version {self._tensor._version}; expected version {self._version}: change a copy"
            )
        return self._tensor


class _Outside:
    """What the hooks outside give."""

    __slots__ = ("_packed", "_unpack")

    def __init__(self, tensor: torch.Tensor, pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> None:
        self._packed, self._unpack = pack(tensor), unpack

    def fetch(self) -> torch.Tensor:
        return self._unpack(self._packed)


class Part:
    """Some elements of a parameter, perhaps in another dtype: made again for the backward.

    Args:
        values: gives the parameter's values, contiguous.
        start, shape, strides: which of them.
        dtype: to which they are cast first.
    """

    __slots__ = ("_dtype", "_shape", "_start", "_strides", "_values")

    def __init__(
        self,
        values: Callable[[], torch.Tensor],
        start: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self._values, self._start, self._shape, self._strides, self._dtype = values, start, shape, strides, dtype

    def fetch(self) -> torch.Tensor:
        values = self._values().to(self._dtype)
        return values.as_strided(self._shape, self._strides, values.storage_offset() + self._start)


def cast_parameter(tensor: torch.Tensor) -> nn.Parameter | None:
    """The contiguous parameter of which a tensor is a cast, as autocast makes it, or a view of one; None for any other.

    Read off the graph, so not of a parameter without a gradient. A cast lies in memory as its parameter does.
    """
    whole = tensor if tensor._base is None else tensor._base
    if whole.grad_fn is None or whole.grad_fn.name() != "ToCopyBackward0":
        return None
    parameter = getattr(whole.grad_fn.next_functions[0][0], "variable", None)
    if not isinstance(parameter, nn.Parameter) or parameter.shape != whole.shape:
        return None
    return parameter if parameter.is_contiguous() and whole.is_contiguous() else None
