"""From a module, a batch and a layout to the final plan: dry run, plan, and the proof of the plan on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_par.errors import ModelError, PlanError
from lightning_par.install import install_tensor_parallel
from lightning_par.layout import Layout
from lightning_par.plan import Overrides, Plan, build_plan
from lightning_par.plan.build import with_partial_gradients
from lightning_par.plan.caution import cautions
from lightning_par.plan.compare import first_difference
from lightning_par.plan.compiled import check_compilation, plan_compilation
from lightning_par.plan.float8 import plan_float8
from lightning_par.plan.nearest import tried_by
from lightning_par.plan.operation import SHAPE
from lightning_par.plan.reference import differences
from lightning_par.plan.segments import SPLITS
from lightning_par.plan.sequence import plan_sequence
from lightning_par.plan.tensor_rules import Flow, infer_flow
from lightning_par.plan.whole import split_line
from lightning_par.runtime.axis import LocalAxis
from lightning_par.runtime.nested import tensors_in
from lightning_par.runtime.precision import FULL, Precision
from lightning_par.trace import Trace, trace_step


def prepare_plan(
    module: nn.Module,
    batch: Any,
    layout: Layout,
    overrides: Mapping[str, Any] | None = None,
    step: str = "training_step",
    counts_targets: bool = False,
    precision: Precision = FULL,
) -> Plan:
    """The plan of a run. One process, no process group; neither the module nor any random state is changed.

    Args:
        module: the user's LightningModule.
        batch: one batch, as the step gets it on one replica.
        layout: sizes of the axes, dp resolved.
        overrides: the user's plan section.
        step: the hook that is run dry: ``training_step``, or another where nothing is trained. Where no model is cut
            or compiled, it may fail.
        counts_targets: whether the parts of a batch count by their targets, see `lightning_par.plan.caution`.
        precision: in which the run computes.

    Raises:
        ConfigurationError: the module, the batch or the plan section does not fit the layout.
    """

    def plan(one: Layout) -> Plan:
        return _plan(module, batch, one, overrides, step, counts_targets, precision)

    with tried_by(plan):
        return plan(layout)


def _plan(
    module: nn.Module,
    batch: Any,
    layout: Layout,
    overrides: Mapping[str, Any] | None,
    step: str,
    counts_targets: bool,
    precision: Precision,
) -> Plan:
    chosen = Overrides.parse(overrides)
    size, is_cut = batch_size_of(batch), layout.model_size > 1 or chosen.compile is not None
    trace = trace_step(
        module,
        batch,
        batch_size=size,
        step=step,
        chain=chosen.chain,
        may_join=_may_join(layout),
        may_mix=_may_mix(layout),
        keep_error=not is_cut,
        precision=precision,
    )
    plan = _any_dtype(build_plan(trace, layout, type(module).__name__, chosen), precision)
    if step == "training_step":
        plan = replace(plan, notes=plan.notes + cautions(trace, plan.layout, batch, counts_targets))
    if layout.tp == 1:
        return _with_options(plan, trace, Flow(), chosen)
    forced = chosen.kinds(trace.layers)
    flow = infer_flow(trace, forced)
    if layout.sp:
        plan = replace(plan, sequence=plan_sequence(trace, layout, plan, flow))
    plan = _choose_activations(module, batch, trace, plan, flow, chosen, precision)
    plan = replace(plan, notes=plan.notes + differences(module, plan, forced))
    return _with_options(plan, trace, flow, chosen)


def _with_options(plan: Plan, trace: Trace, flow: Flow, chosen: Overrides) -> Plan:
    """The plan with how its layers compute: in float8, compiled."""
    if chosen.fp8 is not None:
        float8, note = plan_float8(trace, plan, chosen.fp8)
        plan = replace(plan, float8=float8, notes=(*plan.notes, note))
    if chosen.compile is None:
        return plan
    check_compilation(trace, plan)
    compilation, note = plan_compilation(trace, plan, flow, chosen.compile)
    return replace(plan, compilation=compilation, notes=(*plan.notes, note))


def _any_dtype(plan: Plan, precision: Precision) -> Plan:
    """Under autocast no stage may conclude from its own hidden state what is sent to it.

    Which operations give float32 differs between the device of the dry run and that of the run, and code before the blocks may
    give another dtype than the blocks do.
    """
    if plan.chain is None or precision.autocast is None:
        return plan
    return replace(plan, chain=replace(plan.chain, keeps_shape=False))


def _may_join(layout: Layout) -> bool:
    """Whether several containers of blocks may be one chain: not under sp, because their sequences differ in length."""
    return not layout.sp


def _may_mix(layout: Layout) -> bool:
    """Whether blocks of several classes may be a chain: in a pipeline, where there would be none otherwise."""
    return layout.pp > 1


def batch_size_of(batch: Any) -> int:
    """Samples of a batch: the first dim of its first tensor that has one."""
    return next((tensor.shape[0] for tensor in tensors_in(batch) if tensor.ndim), 1)


def _choose_activations(
    module: nn.Module, batch: Any, trace: Trace, plan: Plan, flow: Flow, chosen: Overrides, precision: Precision
) -> Plan:
    """Give global shapes to the regions whose code goes wrong on plain local tensors, until the split module runs right.

    A region is judged in every block at once, because equal blocks fail alike.
    """
    kept = {name for name, word in chosen.activations(trace.layers).items() if word == "local"}
    plan = _with_global(plan, _unsure(trace, flow) - kept)
    runs = _runs(module, batch, trace, flow, plan.layout, precision)
    while failing := next((names for run in runs if (names := _failing(module, batch, run, plan, kept, precision))), None):
        plan = _with_global(plan, failing)
    return with_partial_gradients(plan, runs[0].trace, runs[0].flow)


@dataclass(frozen=True)
class _Run:
    """A way through the whole module that the split one must take too."""

    trace: Trace
    flow: Flow
    evaluates: bool = False


def _runs(module: nn.Module, batch: Any, trace: Trace, flow: Flow, layout: Layout, precision: Precision) -> list[_Run]:
    """The run that the plan was made from; and the same in evaluation mode, where the code takes another way then."""
    runs = [_Run(*_both_passes(trace, flow))]
    if trace.step == "training_step":
        size, is_real = trace.batch_size, trace.is_real
        other = trace_step(
            module,
            batch,
            batch_size=size,
            may_join=_may_join(layout),
            may_mix=_may_mix(layout),
            keep_error=True,
            is_real=is_real,
            evaluates=True,
            precision=precision,
        )
        if other.error is None and _way(other) != _way(trace):
            runs.append(_Run(other, infer_flow(other, flow.kinds), evaluates=True))
    return runs


def _way(trace: Trace) -> list[tuple[str, str]]:
    return [(op.name, op.module) for op in trace.ops]


def _failing(module: nn.Module, batch: Any, run: _Run, plan: Plan, kept: Set[str], precision: Precision) -> frozenset[str]:
    """The column layers whose plain local outputs a run goes wrong on first; none where it goes right.

    Args:
        kept: layers whose activations the user's plan section wants local.

    Raises:
        PlanError: one of these is among them.
        ModelError: the split module goes wrong, and not by local outputs.
    """
    trace, flow, axis = run.trace, run.flow, LocalAxis("tp", plan.layout.tp, 0)
    local = {layer.name: layer.segments for layer in plan.layers if layer.kind == "column" and layer.activation == "local"}
    split = trace_step(
        module,
        batch,
        batch_size=trace.batch_size,
        step=trace.step,
        chain=None if run.evaluates else trace.chains or None,
        may_join=_may_join(plan.layout),
        may_mix=_may_mix(plan.layout),
        prepare=lambda twin: install_tensor_parallel(twin, plan, axis),
        keep_error=True,
        is_real=trace.is_real,
        evaluates=run.evaluates,
        precision=precision,
    )
    both = replace(split, ops=split.ops + split.again)
    difference = first_difference(trace, both, flow.columns, local, axis.size, plan.sequence)
    if difference is None:
        _check_views(trace, flow, plan, axis)
        return frozenset()
    index, reason = difference
    region = {name for column in _near(trace, flow, index) for name in flow.region(column)}
    failing = _alike(trace, region) & local.keys()
    if failing & kept:
        raise PlanError(f"plan.activation={{{min(failing & kept)}: local}}: {reason}: remove the line")
    if not failing:
        every = {layer.name for layer in plan.layers if layer.kind != "replicate"}
        feeding = _alike(trace, region) & flow.kinds.keys() or every
        raise ModelError(
            f"tp{axis.size}: {plan.module} cannot be split: {reason}. Keep the layers that feed it whole with "
            f"{split_line(feeding, 'replicate')}"
        ) from split.error
    return failing


def _both_passes(trace: Trace, flow: Flow) -> tuple[Trace, Flow]:
    """Trace and flow with the second pass of a step that runs its blocks again: with a cache, it gets other shapes."""
    if not trace.again:
        return trace, flow
    both = replace(trace, ops=trace.ops + trace.again)
    return both, infer_flow(both, flow.kinds)


def _with_global(plan: Plan, names: Set[str]) -> Plan:
    """The plan with activations of global shape behind some column layers."""
    layers = tuple(replace(layer, activation="global") if layer.name in names else layer for layer in plan.layers)
    return replace(plan, layers=layers)


def _unsure(trace: Trace, flow: Flow) -> frozenset[str]:
    """Column layers whose split output lives after the code read a value of a tensor.

    From then on the code may take another way than in the dry run, which nothing was proven of: the rules of activations of
    global shape are right on any way.
    """
    first = len(trace.ops) if trace.first_read is None else trace.first_read
    return frozenset(name for index in range(first, len(trace.ops)) for name in flow.columns[index])


def _check_views(trace: Trace, flow: Flow, plan: Plan, axis: LocalAxis) -> None:
    """Refuse a write into memory that is seen under two shapes, where one of them had to be gathered and is a copy.

    Raises:
        ModelError: names the module and the line that keeps its layers whole.
    """
    shown = {layer.name for layer in plan.layers if layer.kind == "column" and layer.activation == "global"}
    for index, op in enumerate(trace.ops):
        region = flow.columns[index] & shown
        if op.writes_view and region and axis.gathers.keys() & (SHAPE | SPLITS):
            raise ModelError(
                f"tp{axis.size}: {op.name} in {op.module or 'the step'} changes a view of split activations in place, and views "
                "that do not fit the parts are copies: write it without changing tensors in place, or keep the layers whole with "
                f"{split_line(_alike(trace, set(region)) & flow.kinds.keys(), 'replicate')}"
            )


def _near(trace: Trace, flow: Flow, index: int) -> frozenset[str]:
    """The column layers that feed an op; where none do, those that ran or were read last before it."""
    for i in range(index, -1, -1):
        layer = trace.ops[i].layer
        if columns := flow.columns.get(i) or (frozenset([layer]) if layer in flow.reads else frozenset()):
            return columns
    return frozenset()


def _alike(trace: Trace, layers: set[str]) -> frozenset[str]:
    """The same layers in every block."""
    paths = {op.block for op in trace.ops if op.block}
    inner = {name[len(path) + 1 :] for name in layers for path in paths if name.startswith(f"{path}.")}
    return frozenset(layers) | {f"{path}.{name}" for path in paths for name in inner}
