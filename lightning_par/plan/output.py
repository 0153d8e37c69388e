"""What a block of another stage gives in place of its output, so that the user's code goes on as if it had run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_par.runtime.template import Path, Template, arguments_of, fill, leaf_at

Dim = tuple[int, int, int]  # (i, a, b): a / b times dim i of the hidden state that came in; (-1, a, 1): a


@dataclass(frozen=True)
class LeafPlan:
    """One tensor of a block's output.

    Attributes:
        path: where it is in the output.
        dims: its shape.
        dtype: such as ``int64``; empty for that of the hidden state.
        argument: where it is among the block's arguments, if it is one of them.
    """

    path: Path
    dims: tuple[Dim, ...]
    dtype: str = ""
    argument: Path | None = None


@dataclass(frozen=True)
class OutputPlan:
    """The output of a block that is passed over.

    Attributes:
        template: the output without its tensors, see `lightning_par.runtime.template`.
        hidden: where the hidden state is in it; ``()`` for a bare tensor.
        leaves: all tensors in it.
    """

    template: Template
    hidden: Path
    leaves: tuple[LeafPlan, ...]

    @property
    def is_input(self) -> bool:
        """Whether it is one bare tensor, like the hidden state that came in."""
        dims = tuple((index, 1, 1) for index in range(len(self.leaves[0].dims)))
        return self.hidden == () and self.leaves == (LeafPlan((), dims),)

    def build(self, hidden: torch.Tensor, placeholders: Mapping[Path, torch.Tensor]) -> Any:
        """The output around other tensors.

        Args:
            hidden: the hidden state, in the form in which the block got it; the output has another object of the same elements,
                so that code which keeps the hidden states of several blocks keeps several objects.
            placeholders: the other tensors by path; one at the path of the hidden state is taken instead of it.
        """
        return fill(self.template, {self.hidden: _alias(hidden), **placeholders})

    def placeholders(self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Path, torch.Tensor]:
        """For each tensor of the output its argument where it is one, else zeros that take no memory.

        The hidden state has one where the block gives its own argument back, or changes the shape or dtype.

        Args:
            hidden: the hidden state among the arguments of the call.
            args, kwargs: of the call.
        """
        arguments, found = arguments_of(args, kwargs), dict[Path, torch.Tensor]()
        for leaf in self.leaves:
            if leaf.argument is not None:
                found[leaf.path] = leaf_at(arguments, leaf.argument)
            elif leaf.path != self.hidden or not _is_like(leaf, hidden):
                found[leaf.path] = _zeros(leaf, hidden)
        return found


def dims_like(shape: tuple[int, ...], hidden: tuple[int, ...]) -> tuple[Dim, ...]:
    """A shape by that of the hidden state, so that it follows from another hidden state's: of other samples, or longer.

    A dim is that of the hidden state in its place where these are equal, else the first equal one, else a multiple or a share
    of that in its place where that means the same (the samples, or as many dims), else a number.
    """
    return tuple(_dim(size, index, hidden, index == 0 or len(shape) == len(hidden)) for index, size in enumerate(shape))


def _dim(size: int, index: int, hidden: tuple[int, ...], may_share: bool) -> Dim:
    here = hidden[index] if index < len(hidden) else 0
    if size == here:
        return index, 1, 1
    if size > 1 and size in hidden:
        return hidden.index(size), 1, 1
    if may_share and here > 1 and size > 1 and (size % here == 0 or here % size == 0):
        return (index, size // here, 1) if size > here else (index, 1, here // size)
    return -1, size, 1


def _is_like(leaf: LeafPlan, hidden: torch.Tensor) -> bool:
    return _shape(leaf, hidden) == tuple(hidden.shape) and leaf.dtype == ""


def _shape(leaf: LeafPlan, hidden: torch.Tensor) -> tuple[int, ...]:
    return tuple((hidden.shape[index] if index >= 0 else 1) * times // by for index, times, by in leaf.dims)


def _zeros(leaf: LeafPlan, hidden: torch.Tensor) -> torch.Tensor:
    dtype = getattr(torch, leaf.dtype) if leaf.dtype else hidden.dtype
    zeros = torch.zeros((), dtype=dtype, device=hidden.device).expand(_shape(leaf, hidden))
    return zeros.requires_grad_(hidden.requires_grad and dtype.is_floating_point)


def _alias(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.detach().requires_grad_(hidden.requires_grad)
