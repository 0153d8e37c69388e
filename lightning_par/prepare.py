"""From a module, a batch and a layout to the final plan: dry run, plan, and the proof of the plan on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_par.errors import ModelError, PlanError
from lightning_par.install import install_tensor_parallel
from lightning_par.layout import Layout
from lightning_par.plan import Overrides, Plan, build_plan
from lightning_par.plan.build import with_partial_gradients
from lightning_par.plan.caution import cautions
from lightning_par.plan.compare import first_difference
from lightning_par.plan.tensor_rules import Flow, infer_flow
from lightning_par.runtime.axis import LocalAxis
from lightning_par.runtime.nested import tensors_in
from lightning_par.trace import Trace, trace_step


def prepare_plan(
    module: nn.Module, batch: Any, layout: Layout, overrides: Mapping[str, Any] | None = None, step: str = "training_step"
) -> Plan:
    """The plan of a run. One process, no process group; neither the module nor any random state is changed.

    Args:
        module: the user's LightningModule.
        batch: one batch, as the step gets it on one replica.
        layout: sizes of the axes, dp resolved.
        overrides: the user's plan section.
        step: the hook that is run dry: ``training_step``, or another where nothing is trained. Where no model is cut, it may fail.

    Raises:
        ConfigurationError: the module, the batch or the plan section does not fit the layout.
    """
    chosen = Overrides.parse(overrides)
    size, is_cut = batch_size_of(batch), layout.model_size > 1
    trace = trace_step(module, batch, batch_size=size, step=step, chain=chosen.chain, keep_error=not is_cut)
    plan = build_plan(trace, layout, type(module).__name__, chosen)
    if step == "training_step":
        plan = replace(plan, notes=plan.notes + cautions(trace, plan.layout, batch))
    if layout.tp == 1:
        return plan
    return _choose_activations(module, batch, trace, plan, infer_flow(trace, chosen.kinds(trace.layers)), chosen)


def batch_size_of(batch: Any) -> int:
    """Samples of a batch: the first dim of its first tensor that has one."""
    return next((tensor.shape[0] for tensor in tensors_in(batch) if tensor.ndim), 1)


def _choose_activations(module: nn.Module, batch: Any, trace: Trace, plan: Plan, flow: Flow, chosen: Overrides) -> Plan:
    """Give global shapes to the regions whose code goes wrong on plain local tensors, until the split module runs right.

    A region is judged in every block at once, because equal blocks fail alike.
    """
    tp, kept = plan.layout.tp, {name for name, word in chosen.activations(trace.layers).items() if word == "local"}
    while True:
        local = {layer.name: layer.segments for layer in plan.layers if layer.kind == "column" and layer.activation == "local"}
        split = trace_step(
            module,
            batch,
            batch_size=trace.batch_size,
            step=trace.step,
            chain=trace.chain,
            prepare=lambda twin, plan=plan: install_tensor_parallel(twin, plan, LocalAxis("tp", tp, 0)),  # type: ignore[misc]
            keep_error=True,
            is_real=trace.is_real,
        )
        difference = first_difference(trace, split, flow.columns, local, tp)
        if difference is None:
            return with_partial_gradients(plan, trace, flow)
        index, reason = difference
        region = {name for column in _near(trace, flow, index) for name in flow.region(column)}
        failing = _alike(trace, region) & local.keys()
        if failing & kept:
            raise PlanError(f"plan.activation={{{min(failing & kept)}: local}}: {reason}: remove the line")
        if not failing:
            raise ModelError(
                f"tp{tp}: {plan.module} cannot be split: {reason}. Keep the layers that feed it whole with "
                f"plan.split={{{trace.ops[index].module}.*: replicate}}"
            ) from split.error
        layers = tuple(replace(layer, activation="global") if layer.name in failing else layer for layer in plan.layers)
        plan = replace(plan, layers=layers)


def _near(trace: Trace, flow: Flow, index: int) -> frozenset[str]:
    """The column layers that feed an op; where none do, those that ran or were read last before it."""
    for i in range(index, -1, -1):
        layer = trace.ops[i].layer
        if columns := flow.columns.get(i) or (frozenset([layer]) if layer in flow.reads else frozenset()):
            return columns
    return frozenset()


def _alike(trace: Trace, layers: set[str]) -> frozenset[str]:
    """The same layers in every block."""
    paths = [block.path for block in trace.blocks]
    inner = {name[len(path) + 1 :] for name in layers for path in paths if name.startswith(f"{path}.")}
    return frozenset(layers) | {f"{path}.{name}" for path in paths for name in inner}
