"""Linear layers cut over the tp axis (arXiv 1909.08053, section 3).

    column   weight cut along its outputs   x replicated -> x @ w_r          -> y cut along its last dim
    row      weight cut along its inputs    x cut        -> sum_r x_r @ w_r  -> y replicated, + bias once

A column layer followed by a row layer costs one all-reduce forward (row) and one backward (column). Covers
``nn.Linear`` (weight ``[out, in]``) and transformers' ``Conv1D`` (weight ``[in, out]``).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from lightning_par.errors import ModelError
from lightning_par.runtime.axis import Axis
from lightning_par.runtime.collective import copy_to, reduce_from, scatter_to
from lightning_par.runtime.parameter import Split
from lightning_par.tensor.parallel_class import ParallelLayer, convert
from lightning_par.tensor.sharded import ShardedTensor


class SharedInput:
    """Lets several column layers that read one tensor share one all-reduce of its gradient.

    The first reader makes the copy whose gradient is summed over the axis; the others read the same copy, so that
    autograd adds up their gradients before the one all-reduce. Holds the copy until all have read it, or until the
    tensor is gone (a forward that was left by an exception).
    """

    def __init__(self, num_readers: int) -> None:
        self._num_readers, self._num_reads = num_readers, 0
        self._source: weakref.ref[torch.Tensor] | None = None
        self._copy: torch.Tensor | None = None

    def read(self, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        """``tensor`` with its gradient summed over the axis, once for all readers."""
        if self._num_readers == 1 or not (tensor.requires_grad and torch.is_grad_enabled()):
            return copy_to(tensor, axis)
        if self._copy is None or self._source is None or self._source() is not tensor:
            self._copy, self._num_reads = copy_to(tensor, axis), 0
            self._source = weakref.ref(tensor, self._forget)
        copy, self._num_reads = self._copy, self._num_reads + 1
        if self._num_reads == self._num_readers:
            self._forget(self._source)
        return copy

    def _forget(self, source: weakref.ref[torch.Tensor] | None) -> None:
        """Drop the copy, unless it is by now one of another source."""
        if source is self._source:
            self._source, self._copy, self._num_reads = None, None, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        return memo.setdefault(id(self), SharedInput(self._num_readers))


@dataclass(frozen=True)
class LinearRecord:
    """How a converted linear layer is cut.

    Attributes:
        kind: ``column`` or ``row``.
        axis: the tp axis.
        segments: global sizes along the cut dim of the weight.
        transposed: the weight is ``[in, out]``.
        output: what a column layer gives: its ``local`` part, or a sharded tensor that shows the ``global`` shape.
        shared: the column layers that read the same input.
    """

    kind: Literal["column", "row"]
    axis: Axis
    segments: tuple[int, ...]
    transposed: bool
    output: Literal["local", "global"] = "local"
    shared: SharedInput | None = None

    def describe(self, module: nn.Module) -> str:
        weight = tuple(module.weight.shape) if isinstance(module.weight, torch.Tensor) else None
        fused = f" in segments {self.segments}" if len(self.segments) > 1 else ""
        return f"{self.kind}-parallel{fused} over {self.axis.name}={self.axis.size}, local weight {weight}"

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearRecord:
        return self  # process groups cannot be copied


class _ParallelLinear(ParallelLayer):
    weight: nn.Parameter
    bias: nn.Parameter | None

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The local matrix product."""
        return functional.linear(x, self.weight.t() if self.record.transposed else self.weight, bias)


class ColumnParallelLinear(_ParallelLinear):
    """A linear layer of which each rank computes its part of the outputs."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in]``, replicated, to ``[..., out]``: local part or sharded tensor, as the record says.

        Collective over the axis in the backward.
        """
        record: LinearRecord = self.record
        axis = record.axis
        if isinstance(input, ShardedTensor):
            axis.gathers[type(self).__name__] += 1
            input = input.full_tensor()
        x = copy_to(input, axis) if record.shared is None else record.shared.read(input, axis)
        local = self.product(x, self.bias)
        return local if record.output == "local" or axis.size == 1 else ShardedTensor(local, local.dim() - 1, record.segments, axis)


class RowParallelLinear(_ParallelLinear):
    """A linear layer of which each rank multiplies its part of the inputs; the results are summed."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in]``, cut along its last dim or whole, to ``[..., out]``, replicated. Collective over the axis."""
        record: LinearRecord = self.record
        total = reduce_from(self.product(self._local_input(input, record), None), record.axis)
        return total if self.bias is None else total + self.bias

    def _local_input(self, input: torch.Tensor, record: LinearRecord) -> torch.Tensor:
        if isinstance(input, ShardedTensor):
            if input.shard_dim == input.ndim - 1 and input.segments == record.segments:
                return input.local
            record.axis.gathers[type(self).__name__] += 1
            input = input.full_tensor()
        if input.shape[-1] == sum(record.segments):
            return scatter_to(input, record.axis, Split(input.dim() - 1, record.segments))
        return input


def convert_linear(
    module: nn.Module,
    kind: Literal["column", "row"],
    axis: Axis,
    *,
    segments: tuple[int, ...] | None = None,
    output: Literal["local", "global"] = "local",
    shared: SharedInput | None = None,
) -> None:
    """Make a linear layer column- or row-parallel, in place. Its parameters are already the local shards.

    Args:
        module: an ``nn.Linear`` or a transformers ``Conv1D``, or of a class derived from them.
        kind: ``column`` cuts the outputs, ``row`` the inputs.
        axis: the tp axis.
        segments: global sizes of the fused parts along the cut dim (query, key and value in one weight); one by default.
        output: whether a column layer gives its plain local part or a `ShardedTensor` of the global shape.
        shared: the same object for all column layers that read the same tensor.

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
    cut = Split(0, segments or (size,))
    if sum(cut.segments) != size or not cut.divides(axis.size):
        side = "outputs" if kind == "column" else "inputs"
        raise ModelError(
            f"{type(module).__name__} has {size} {side} in segments {cut.segments}; each must divide by tp={axis.size} "
            "and they must add up: choose a smaller tp, or leave the layer whole in the plan"
        )
    record = LinearRecord(kind, axis, cut.segments, transposed, output, shared)
    convert(module, base, ColumnParallelLinear if kind == "column" else RowParallelLinear, record)


def linear_base(cls: type) -> type[nn.Module] | None:
    """``nn.Linear`` or transformers' ``Conv1D``, whichever ``cls`` is derived from, found without importing transformers."""
    for base in cls.__mro__:
        if base is nn.Linear or (base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"):
            return base
    return None
