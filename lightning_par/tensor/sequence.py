"""Hidden states cut along the sequence between the blocks (arXiv 2205.05198, section 4.2.2).

    replicated    x -> norm -> column -> ... -> row -> + x           all-reduce in row, and in column's backward
    cut           x -> norm -> column -> ... -> row -> + x           the same bytes: all-gather in column, reduce-scatter
                  |- 1/tp of the tokens -|          |- 1/tp -|       in row, and their reverse in the backward

Norms, residuals and dropout work on 1/tp of the tokens, and the pipeline sends 1/tp. To the user's code the hidden state
is a `ShardedTensor`, which shows its global shape. Modules that treat every position alike (norms) run on the plain part.
A sequence that does not divide is padded at its end; nothing that leaves the parts has the padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_par.private.torch import unseen_by_modes
from lightning_par.runtime.axis import Axis
from lightning_par.runtime.collective import addend, reduce_from, scatter_from, scatter_to
from lightning_par.runtime.nested import map_tensors, tensors_in
from lightning_par.runtime.parameter import Split
from lightning_par.tensor.sharded import ShardedTensor

_SEQUENCE, _COMPILED = "lightning_par_sequence", "lightning_par_compiled"


class SequenceParallel:
    """The hidden states of one module on one rank.

    Parameters that meet them have gradients that cover this rank's tokens: addends, to be summed over the axis.

    Args:
        axis: the tp axis.
        dim: the sequence dim of a hidden state.
    """

    def __init__(self, axis: Axis, dim: int) -> None:
        self.axis, self.dim = axis, dim
        self._cuts: dict[tuple[int, ...], Split] = {}  # by leading dims, of what column layers have read

    # ------------------------------------------------------------------ at the ends of the chain, and between stages

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """The cut hidden state for the first block, from the replicated one."""
        self._cuts.clear()
        if isinstance(hidden, ShardedTensor):
            return hidden
        return self._parted(hidden)

    def like(self, hidden: torch.Tensor) -> torch.Tensor:
        """A tensor with the shape and dtype of this rank's part of ``hidden``; takes no memory."""
        return hidden.new_empty(()).expand(self._cut(hidden).local_shape(tuple(hidden.shape), self.axis.size))

    def arrive(self, received: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The cut hidden state from the part that another stage sent.

        Args:
            received: the part.
            hidden: a whole one of the same shape.
        """
        self._cuts.clear()
        return ShardedTensor(received, self.dim, self._cut(hidden).segments, self.axis)

    def leave(self, hidden: torch.Tensor) -> torch.Tensor:
        """The part of a hidden state that the next stage gets."""
        return self._part(hidden, self._cut(hidden))

    def _cut(self, hidden: torch.Tensor) -> Split:
        return Split(self.dim, (hidden.shape[self.dim],))

    def _parted(self, hidden: torch.Tensor) -> ShardedTensor:
        cut = self._cut(hidden)
        return ShardedTensor(self._part(hidden, cut), cut.dim, cut.segments, self.axis)

    def _part(self, tensor: torch.Tensor, cut: Split) -> torch.Tensor:
        """The plain part of a tensor, however it is cut. A dry run must not take this for the user's code."""
        if isinstance(tensor, ShardedTensor) and tensor.cut == cut:
            return tensor.local
        with unseen_by_modes():
            return scatter_to(tensor.full_tensor() if isinstance(tensor, ShardedTensor) else tensor, self.axis, cut)

    # ------------------------------------------------------------------ at column and row layers

    def note(self, tensor: ShardedTensor) -> None:
        """Remember how what a column layer reads is cut, for the row layer after it."""
        self._cuts[tuple(tensor.shape[:-1])] = tensor.cut

    def leave_region(self, part: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The sum of a row layer's products, cut as what the column layers before it read. Collective over the axis.

        Args:
            part: this rank's product ``[..., out]``.
            bias: added once.
        """
        cut = self._cuts.get(tuple(part.shape[:-1]))
        if cut is None:  # they read a replicated tensor
            total = reduce_from(part, self.axis)
            return total if bias is None else total + addend(bias, self.axis).to(total.dtype)
        local = scatter_from(part, self.axis, cut)
        return ShardedTensor(local if bias is None else local + bias.to(local.dtype), cut.dim, cut.segments, self.axis)

    # ------------------------------------------------------------------ modules that treat every position alike

    def on_parts(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module's ``forward`` on the plain parts of its arguments, and show the global shape again.

        Where the module is given replicated tensors, these are cut and its output is gathered: its parameters' gradients are
        addends in any case.
        """
        tensors = tensors_in((args, kwargs))
        lead = next((tensor for tensor in tensors if isinstance(tensor, ShardedTensor)), None)
        is_replicated = lead is None
        if lead is None:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            lead = self._parted(tensors[0])
        shape, cut = lead.shape[:-1], lead.cut

        def part(tensor: torch.Tensor) -> torch.Tensor:
            return self._part(tensor, cut) if tensor.shape[:-1] == shape else tensor

        output = map_tensors(lead.rewrap, forward(*map_tensors(part, args), **map_tensors(part, kwargs)))
        return map_tensors(_whole, output) if is_replicated else output


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    with unseen_by_modes():
        return tensor.full_tensor() if isinstance(tensor, ShardedTensor) else tensor


class _PositionwiseModule(nn.Module):
    """A module that runs on the parts of a cut hidden state; mixed in before the user's class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sequence: SequenceParallel = self.__dict__[_SEQUENCE]
        compiled = self.__dict__.get(_COMPILED)
        return sequence.on_parts(super().forward if compiled is None else functools.partial(compiled, self), args, kwargs)


def convert_positionwise(module: nn.Module, sequence: SequenceParallel) -> None:
    """Let a module that treats every position alike run on the parts of a cut hidden state, in place."""
    module.__dict__[_SEQUENCE] = sequence
    classes: tuple[Any, ...] = (type(module),)
    module.__class__ = _derive(*classes)


def compile_positionwise(module: nn.Module, compile: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let what such a module does to its plain parts be compiled by ``compile``, in place."""
    cls: Any = type(module)
    module.__dict__[_COMPILED] = compile(super(_PositionwiseModule, cls).forward)  # of the class: a copy of the module has it too


@functools.cache
def _derive(cls: type[nn.Module]) -> Any:
    return type(cls.__name__, (_PositionwiseModule, cls), {"__module__": cls.__module__})
