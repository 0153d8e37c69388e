"""Sequence parallelism, read off the trace: which dim of the hidden state is the sequence, and which modules treat every
position alike, so that they run on a rank's part of it (arXiv 2205.05198, section 4.2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_par.errors import ModelError
from lightning_par.layout import Layout
from lightning_par.plan.operation import CASTS, OVER_LAST, POINTWISE, dims_along, first_normalized_dim
from lightning_par.plan.plan import LayerPlan, Plan, SequencePlan
from lightning_par.plan.tensor_rules import Flow
from lightning_par.trace import Op, Trace

_REDUCTIONS = {"mean", "sum", "var", "norm", "amax"}


def plan_sequence(trace: Trace, layout: Layout, plan: Plan, flow: Flow) -> SequencePlan:
    """The sequence dim and the modules that run on parts.

    Args:
        trace: a dry run.
        layout: one with ``sp``, as the user typed it.
        plan: the plan so far.
        flow: where split activations run.

    Raises:
        ModelError: there is no chain of blocks, or its hidden state is not ``[batch, sequence, features]`` all along.
    """
    dim = _sequence_dim(trace, layout, plan.module)
    found = _PositionwiseModules(trace, dim, {layer.name: layer for layer in plan.layers}, flow)
    return SequencePlan(dim, tuple(found.names()))


def _sequence_dim(trace: Trace, layout: Layout, module: str) -> int:
    instead = f"use parallel={replace(layout, sp=False)}"
    if not trace.blocks:
        raise ModelError(
            f"parallel={layout}: sp cuts the hidden state between the blocks of a chain, and {module} has none that the step "
            f"runs in order: name the container of the blocks with plan.chain=PATH, or {instead}"
        )
    shapes = {trace.values[number].shape for block in trace.blocks for number in (block.carry_in, block.carry_out)}
    shape = min(shapes)
    if len(shapes) > 1 or len(shape) != 3:
        raise ModelError(
            f"parallel={layout}: sp needs a hidden state [batch, sequence, features] that keeps its shape, and the blocks of "
            f"{trace.chain_name} pass on {', '.join(str(list(one)) for one in sorted(shapes))}: {instead}"
        )
    return 0 if shape[0] != trace.batch_size and shape[1] == trace.batch_size else 1


class _PositionwiseModules:
    """Finds modules whose every operation computes each position of the hidden state from that position alone."""

    def __init__(self, trace: Trace, dim: int, layers: Mapping[str, LayerPlan], flow: Flow) -> None:
        self._trace, self._dim, self._layers, self._flow = trace, dim, layers, flow
        first = trace.values[trace.blocks[0].carry_in]
        self._length, self._ndim = first.shape[dim], len(first.shape)
        self._made_of_parameters: set[int] = set()  # values into which nothing but parameters went

    def names(self) -> list[str]:
        """Paths of the modules, in the order of their first call."""
        calls: dict[str, list[tuple[int, Op]]] = {}
        for index, op in enumerate(self._trace.ops):
            calls.setdefault(op.layer or op.module, []).append((index, op))
        return [path for path, ops in calls.items() if path and self._is_positionwise(path, ops, calls)]

    def _is_positionwise(self, path: str, ops: list[tuple[int, Op]], calls: Mapping[str, object]) -> bool:
        if any(other.startswith(f"{path}.") for other in calls):
            return False  # a module of modules: each of these is looked at
        if path in self._layers and self._layers[path].kind != "replicate":
            return False
        return any(op.parameters for _, op in ops) and all(self._fits(index, op) for index, op in ops)

    def _fits(self, index: int, op: Op) -> bool:
        trace = self._trace
        if op.phase == 0 or self._flow.columns.get(index):
            return False
        if not op.inputs or self._made_of_parameters.issuperset(op.inputs):
            self._made_of_parameters.update(op.outputs)
            return bool(op.parameters or op.inputs)
        inputs = [trace.values[n] for n in op.inputs if n not in self._made_of_parameters]
        outputs = [trace.values[n] for n in op.outputs]
        if not all(value.depends_on_parameters for value in inputs):
            return False  # a mask or the like has the whole length
        if not all(len(v.shape) == self._ndim and v.shape[self._dim] == self._length for v in (*inputs, *outputs)):
            return False
        return self._keeps_positions(op, inputs[0].shape)

    def _keeps_positions(self, op: Op, shape: tuple[int, ...]) -> bool:
        if op.layer is not None:
            return op.name in ("linear", "conv1d")
        if op.name in OVER_LAST:
            return self._dim < first_normalized_dim(op, self._ndim)
        if op.name in _REDUCTIONS:
            dims = dims_along(op)
            return op.named.get("keepdim") is True and all(type(d) is int and d % self._ndim != self._dim for d in dims)
        return op.name in POINTWISE | CASTS or op.name == "linear"
