"""Linear layers cut over the tp axis (arXiv 1909.08053, section 3).

    column   weight cut along its outputs   x replicated -> x @ w_r          -> y cut along its last dim
    row      weight cut along its inputs    x cut        -> sum_r x_r @ w_r  -> y replicated, + bias once

A column layer followed by a row layer costs one all-reduce forward (row) and one backward (column). Covers
``nn.Linear`` (weight ``[out, in]``) and transformers' ``Conv1D`` (weight ``[in, out]``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from lightning_par.errors import ModelError
from lightning_par.private.torch import runs_as_written
from lightning_par.runtime.arithmetic import AS_GIVEN, Arithmetic
from lightning_par.runtime.axis import Axis
from lightning_par.runtime.collective import reduce_from, scatter_to
from lightning_par.runtime.deferral import DeferredGradients
from lightning_par.runtime.parameter import Split
from lightning_par.tensor.copies import axis_with
from lightning_par.tensor.entrance import SharedInput, product
from lightning_par.tensor.ghost import shielded
from lightning_par.tensor.parallel_class import ParallelLayer, convert
from lightning_par.tensor.sequence import SequenceParallel
from lightning_par.tensor.sharded import ShardedTensor


@dataclass(frozen=True)
class LinearRecord:
    """How a converted linear layer is cut.

    Attributes:
        kind: ``column`` or ``row``.
        axis: the tp axis.
        cut: along the outputs or the inputs, by dim 0.
        transposed: the weight is ``[in, out]``.
        output: what a column layer gives: its ``local`` part, or a sharded tensor that shows the ``global`` shape.
        shared: the column layers that read the same input.
        sequence: where hidden states are cut along the sequence between the blocks; None where they are replicated.
        deferred: where weight gradients may be left for later.
        arithmetic: how it multiplies.
    """

    kind: Literal["column", "row"]
    axis: Axis
    cut: Split
    transposed: bool
    output: Literal["local", "global"]
    shared: SharedInput
    sequence: SequenceParallel | None
    deferred: DeferredGradients | None = None
    arithmetic: Arithmetic = AS_GIVEN

    def describe(self, module: nn.Module) -> str:
        weight = tuple(module.weight.shape) if isinstance(module.weight, torch.Tensor) else None
        fused = f" in segments {self.cut.segments}" if len(self.cut.segments) > 1 else ""
        return f"{self.kind}-parallel{fused} over {self.axis.name}={self.axis.size}, local weight {weight}"

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearRecord:
        return self  # process groups cannot be copied


class _ParallelLinear(ParallelLayer):
    weight: nn.Parameter
    bias: nn.Parameter | None


class ColumnParallelLinear(_ParallelLinear):
    """A linear layer of which each rank computes its part of the outputs."""

    @runs_as_written
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in]``, replicated or cut along the sequence, to ``[..., out]``: local part or sharded tensor.

        Collective over the axis in the backward; for an input that is cut, in the forward too.
        """
        record: LinearRecord = self.record
        axis = record.axis
        if isinstance(input, ShardedTensor):
            input = self._readable(input, record)
        x, handle = record.shared.read(self, input, axis)
        local = product(x, self.weight, self.bias, record.transposed, handle, record.deferred, record.arithmetic)
        return local if record.output == "local" or axis.size == 1 else sharded_output(local, record)

    def _readable(self, input: ShardedTensor, record: LinearRecord) -> torch.Tensor:
        """An input that is cut along the sequence, or the whole one where it is cut in another way."""
        if input.axis is record.axis and input.shard_dim < input.ndim - 1:
            if record.sequence is not None:
                record.sequence.note(input)
            return input
        input.axis.gathers[type(self).__name__] += 1
        return input.full_tensor()


def sharded_output(local: torch.Tensor, record: LinearRecord) -> ShardedTensor:
    """The output of a column layer with the shape that the user's code expects."""
    cut, axis = replace(record.cut, dim=local.dim() - 1), axis_with(record.axis, record.cut.copies)
    return ShardedTensor(shielded(local, cut, axis), cut.dim, cut.segments, axis)


class RowParallelLinear(_ParallelLinear):
    """A linear layer of which each rank multiplies its part of the inputs; the results are summed."""

    @runs_as_written
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in]``, cut along its last dim or whole, to ``[..., out]``: replicated, or cut along the sequence.

        Collective over the axis.
        """
        record: LinearRecord = self.record
        x = self._local_input(input, record)
        part = product(x, self.weight, None, record.transposed, None, record.deferred, record.arithmetic)
        if record.sequence is not None:
            return record.sequence.leave_region(part, self.bias)
        total = reduce_from(part, record.axis)
        return total if self.bias is None else total + self.bias.to(total.dtype)  # under autocast the product has another

    def _local_input(self, input: torch.Tensor, record: LinearRecord) -> torch.Tensor:
        if isinstance(input, ShardedTensor):
            if input.axis is record.axis and input.shard_dim == input.ndim - 1 and input.segments == record.cut.segments:
                return input.local
            record.axis.gathers[type(self).__name__] += 1
            input = input.full_tensor()
        if input.shape[-1] == sum(record.cut.segments):
            return scatter_to(input, record.axis, Split(input.dim() - 1, record.cut.segments))
        return input


def convert_linear(
    module: nn.Module,
    kind: Literal["column", "row"],
    axis: Axis,
    *,
    segments: tuple[int, ...] | None = None,
    copies: tuple[int, ...] = (),
    output: Literal["local", "global"] = "local",
    shared: SharedInput | None = None,
    sequence: SequenceParallel | None = None,
    is_padded: bool = False,
) -> None:
    """Make a linear layer column- or row-parallel, in place. Its parameters are already the local shards.

    Args:
        module: an ``nn.Linear`` or a transformers ``Conv1D``, or of a class derived from them.
        kind: ``column`` cuts the outputs, ``row`` the inputs.
        axis: the tp axis.
        segments: global sizes of the fused parts along the cut dim (query, key and value in one weight); one by default.
        copies: ranks in a row that hold the same part, for each segment (see `Split`).
        output: whether a column layer gives its plain local part or a `ShardedTensor` of the global shape.
        shared: the same object for all column layers that read the same tensor.
        sequence: the same object for all layers of a module whose hidden states are cut along the sequence.
        is_padded: whether a cut that does not divide is meant, as of a vocabulary.

    Raises:
        ModelError: another class of module, or a cut that does not divide.
    """
    base = linear_base(type(module))
    if base is None:
        raise ModelError(
            f"{type(module).__name__} is no nn.Linear or Conv1D and cannot be {kind}-parallel: leave it whole in the plan"
        )
    transposed = base is not nn.Linear
    names = ("nx", "nf") if transposed else ("in_features", "out_features")
    size: int = getattr(module, names[kind == "column"])
    cut = Split(0, segments or (size,), copies)
    if sum(cut.segments) != size or not (is_padded or cut.divides(axis.size)):
        side = "outputs" if kind == "column" else "inputs"
        raise ModelError(
            f"{type(module).__name__} has {size} {side} in segments {cut.segments}; each must divide by tp={axis.size} "
            "and they must add up: choose a smaller tp, or leave the layer whole in the plan"
        )
    record = LinearRecord(kind, axis, cut, transposed, output, shared or SharedInput(), sequence)
    if kind == "column":
        record.shared.add(module)
    convert(module, base, ColumnParallelLinear if kind == "column" else RowParallelLinear, record)


def linear_base(cls: type) -> type[nn.Module] | None:
    """``nn.Linear`` or transformers' ``Conv1D``, whichever ``cls`` is derived from, found without importing transformers."""
    for base in cls.__mro__:
        if base is nn.Linear or (base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"):
            return base
    return None
