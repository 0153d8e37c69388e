"""Trace and layout in, plan out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

from lightning_par.errors import PlanError
from lightning_par.layout import Layout
from lightning_par.plan.check import (
    check_batch_statistics,
    check_chain,
    check_divides,
    check_offload,
    check_offload_chain,
    check_one_split,
    check_recompute,
    check_second_derivatives,
    resolve_microbatches,
)
from lightning_par.plan.crossing import plan_boundaries
from lightning_par.plan.cut import cut_chain, unevenness
from lightning_par.plan.effect import side_effects
from lightning_par.plan.output import LeafPlan, OutputPlan, dims_like
from lightning_par.plan.override import Overrides, RecomputeWord
from lightning_par.plan.plan import Activation, ChainPlan, ForwardWork, Kind, LayerPlan, ParameterPlan, Plan, Recompute, StagePlan
from lightning_par.plan.segments import OutputUse, output_use
from lightning_par.plan.tensor_rules import Flow, infer_flow, read_from_outside
from lightning_par.plan.vocabulary import agree_on_ties, infer_vocabulary, padded
from lightning_par.plan.whole import kept_whole
from lightning_par.runtime.parameter import ParameterSpec, Split
from lightning_par.trace import Block, Layer, Trace

BACKWARD_TO_FORWARD = 2  # the gradients of a matrix product are two products of its size


def build_plan(trace: Trace, layout: Layout, module: str, overrides: Overrides | None = None) -> Plan:
    """Decide everything for a layout whose dp is known.

    Every column layer is planned with plain local activations; `lightning_par.prepare` turns those whose code needs
    global shapes, and marks partial gradients at the end.

    Args:
        trace: a dry run of the module.
        layout: sizes of the axes, dp resolved.
        module: class name of the user's module, for messages.
        overrides: the user's plan section.

    Raises:
        ModelError: the module cannot be split this way.
        DataError: the batch does not split into the microbatches.
        PlanError: a line of the plan section matches nothing or does not fit.
    """
    overrides = overrides or Overrides()
    forced = overrides.kinds(trace.layers)
    check_chain(trace, layout, module)
    resolved = replace(layout, microbatches=resolve_microbatches(layout, trace.batch_size))
    check_batch_statistics(trace, resolved)
    check_second_derivatives(trace, resolved)
    layers = _plan_layers(trace, layout, forced, overrides)
    counts = cut_chain(trace, layout, overrides)
    bounds = [sum(counts[:stage]) for stage in range(len(counts) + 1)]
    boundaries = plan_boundaries(trace, layout, bounds[:-1])
    held = _held_by_stages(trace, bounds)
    parameters = _plan_parameters(trace, {layer.name: layer for layer in layers}, held, layout)
    notes = trace.notes + kept_whole(trace, layers, layout.tp) + padded(trace, layers, layout.tp)
    return Plan(
        layout=resolved,
        module=module,
        chain=_chain(trace, overrides, module),
        stages=tuple(
            _stage(trace, parameters, held, layout.tp, stage, first, last) for stage, (first, last) in enumerate(pairwise(bounds))
        ),
        layers=layers,
        parameters=parameters,
        boundaries=boundaries,
        notes=notes + (side_effects(trace, bounds[-2]) if len(counts) > 1 else ()) + unevenness(counts, layout),
        module_flops=trace.module_flops,
        work=ForwardWork(
            causal_flops=sum(trace.flops) + trace.attention_flops[0],
            whole_flops=sum(trace.flops) + trace.attention_flops[1],
            samples=trace.batch_size,
            tokens=trace.tokens,
        ),
    )


def with_partial_gradients(plan: Plan, trace: Trace, flow: Flow) -> Plan:
    """The plan with its partial parameters marked, once the activations of every layer are decided.

    A whole parameter that meets split activations as plain tensors gets from each tp rank the gradient of that rank's part:
    in local regions, and under sequence parallelism in modules that run on parts and in row layers, where it is the bias.
    Where activations have their global shape, they sum it themselves.
    """
    local = {layer.name for layer in plan.layers if layer.kind == "column" and layer.activation == "local"}
    ops = [op for index, op in enumerate(trace.ops) if op.layer is None and flow.columns.get(index, frozenset()) & local]
    if plan.sequence is not None:
        on_parts = {*plan.sequence.modules, *(layer.name for layer in plan.layers if layer.kind == "row")}
        ops += [op for op in trace.ops if (op.layer or op.module) in on_parts]
    partial = {trace.canonical(name) for op in ops for name in op.parameters}
    marked = (
        replace(parameter, spec=replace(parameter.spec, partial=parameter.spec.name in partial and parameter.spec.split is None))
        for parameter in plan.parameters
    )
    return replace(plan, parameters=tuple(marked))


# ---------------------------------------------------------------------- layers


def _plan_layers(trace: Trace, layout: Layout, forced: Mapping[str, Kind], overrides: Overrides) -> tuple[LayerPlan, ...]:
    segments_of, activations = overrides.segments_of(trace.layers), overrides.activations(trace.layers)
    if layout.tp == 1:
        return ()
    flow = infer_flow(trace, forced)
    kinds: dict[str, tuple[Kind, str]] = {name: (kind, flow.why.get(name, "")) for name, kind in flow.kinds.items()}
    kinds.update({name: kind for name, kind in infer_vocabulary(trace, forced).items() if name not in kinds})
    kinds.update({name: ("replicate", why) for name, why in read_from_outside(trace).items() if name in kinds})
    kinds = agree_on_ties(trace, kinds)
    uses = _output_uses(trace, [name for name, (kind, _) in kinds.items() if kind == "column"], segments_of)
    readers: dict[int, str] = {}
    plans = []
    for name, (kind, why) in kinds.items():
        layer, use = trace.layers[name], uses.get(name)
        copies: tuple[int, ...] = (1,)
        activation = activations.get(name, "local" if name in flow.kinds else "global")
        if use is not None:
            queries = max(heads for other in flow.region(name) & uses.keys() for heads in uses[other].heads)
            if activation == "local" or name in flow.kinds:  # others show their global shape, so a vocabulary may be padded
                check_divides(layer, use, layout, "outputs", queries)
            copies = use.copies(layout.tp, queries)
        elif kind == "row":
            check_divides(layer, OutputUse((layer.in_size,), (0,)), layout, "inputs")
        shared = readers.setdefault(flow.reads[name], name) if name in flow.reads and kind == "column" else ""
        segments = use.segments if use else ()
        plans.append(LayerPlan(name, kind, segments, copies if max(copies) > 1 else (), activation, shared, why))
    whole = next((plan for plan in plans if plan.kind != "column" and plan.name in {**segments_of, **activations}), None)
    if whole is not None:
        raise PlanError(
            f"plan.segments and plan.activation are lines of column layers, and {whole.name} is split as {whole.kind}: remove the "
            f"line, or add plan.split={{{whole.name}: column}}"
        )
    return _with_global_shapes(plans, flow, activations)


def _with_global_shapes(plans: list[LayerPlan], flow: Flow, chosen: Mapping[str, Activation]) -> tuple[LayerPlan, ...]:
    """The plans with global shapes where ranks hold copies of heads: code that repeats a key head reads both numbers of heads."""
    shown = {name for plan in plans if plan.copies for name in flow.region(plan.name)}
    local = next((name for name in sorted(shown) if chosen.get(name) == "local"), None)
    if local is not None:
        raise PlanError(
            f"plan.activation={{{local}: local}}: there are fewer key heads than ranks, and plain tensors would show each rank "
            "a number of them that its query heads do not match: remove the line"
        )
    return tuple(replace(plan, activation="global") if plan.kind == "column" and plan.name in shown else plan for plan in plans)


def _output_uses(trace: Trace, columns: list[str], chosen: Mapping[str, tuple[int, ...]]) -> dict[str, OutputUse]:
    """What the code does with the output of each column layer; the fused parts are as the user says, where they say."""
    outputs = {op.layer: op.outputs[0] for op in trace.ops if op.layer is not None}
    return {
        name: _chosen_use(trace.layers[name], chosen[name])
        if name in chosen
        else output_use(trace, trace.layers[name], outputs[name])
        for name in columns
    }


def _chosen_use(layer: Layer, segments: tuple[int, ...]) -> OutputUse:
    if sum(segments) != layer.out_size:
        raise PlanError(
            f"plan.segments={{{layer.name}: {list(segments)}}}: the sizes add up to {sum(segments)}, and the layer has "
            f"{layer.out_size} outputs: correct them"
        )
    return OutputUse(segments, (0,) * len(segments))


# ---------------------------------------------------------------------- stages


def _chain(trace: Trace, overrides: Overrides, module: str) -> ChainPlan | None:
    if not trace.blocks:
        check_recompute(trace, overrides.recompute, module)
        check_offload_chain(trace, overrides.offload_activations, module)
        return None
    blocks = trace.blocks
    recomputed = overrides.recomputed(block.path for block in blocks)
    offloaded = overrides.offloaded(block.path for block in blocks)
    check_offload({path: recomputed.get(path, "none") for path, chosen in offloaded.items() if chosen}, overrides.compile)
    end = next((index for index, op in enumerate(trace.ops) if op.phase == 2 * len(blocks)), len(trace.ops))
    forms = {_form(trace, number) for block in blocks for number in (block.carry_in, block.carry_out)}
    return ChainPlan(
        paths=trace.chains,
        blocks=tuple(block.path for block in blocks),
        carry_argument=tuple(block.carry_argument for block in blocks),
        outputs=tuple(_output(trace, block) for block in blocks),
        recompute=tuple(_recompute(recomputed.get(block.path, "none")) for block in blocks),
        offload_activations=tuple(offloaded.get(block.path, False) for block in blocks),
        has_gradients=tuple(block.has_gradients for block in blocks),
        keeps_shape=len(forms) == 1,
        is_static=not trace.is_real and (trace.first_read is None or trace.first_read >= end),
    )


def _recompute(word: RecomputeWord) -> Recompute:
    """What is known of a block so far: nothing is computed again until `lightning_par.memory.fit` finds that it must be."""
    return "none" if word == "auto" else word


def _form(trace: Trace, number: int) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a value."""
    return trace.values[number].shape, trace.values[number].dtype


def _output(trace: Trace, block: Block) -> OutputPlan:
    shape, dtype = _form(trace, block.carry_in)
    leaves = [
        LeafPlan(path, dims_like(form[0], shape), "" if form[1] == dtype else form[1], block.passed.get(path))
        for path, number in block.results.items()
        for form in [_form(trace, number)]
    ]
    return OutputPlan(block.template, block.carry_output, tuple(leaves))


def _stage(
    trace: Trace,
    parameters: tuple[ParameterPlan, ...],
    held: Mapping[str, set[int]],
    tp: int,
    stage: int,
    first: int,
    last: int,
) -> StagePlan:
    phases = [phase for phase in range(len(trace.flops)) if first <= trace.block_of(phase) < max(last, 1)]
    read = [parameter for parameter in parameters if any(stage in held[alias] for alias, _ in parameter.aliases)]
    return StagePlan(
        first,
        last,
        num_parameters=sum(parameter.local_numel(1) for parameter in read),
        parameter_bytes=sum(parameter.local_numel(tp) * parameter.itemsize for parameter in read),
        flops=sum(trace.flops[phase] for phase in phases),
        saved_bytes=sum(trace.saved_bytes[phase] for phase in phases),
    )


# ---------------------------------------------------------------------- parameters


def _plan_parameters(
    trace: Trace, layers: Mapping[str, LayerPlan], held: Mapping[str, set[int]], layout: Layout
) -> tuple[ParameterPlan, ...]:
    splits = _splits(trace, layers)
    places = {alias: tuple(sorted({layout.pp_of(stage) for stage in stages})) for alias, stages in held.items()}
    plans = []
    for name, info in trace.parameters.items():
        every = tuple(sorted(set().union(*(places[alias] for alias in info.aliases))))
        aliases = tuple((alias, places[alias]) for alias in info.aliases)
        split = next((splits[alias] for alias in info.aliases if alias in splits), None)
        check_one_split(info, splits)
        spec = ParameterSpec(name, info.shape, split, every)
        plans.append(ParameterPlan(spec, aliases, info.itemsize, info.requires_grad))
    return tuple(plans)


def _splits(trace: Trace, layers: Mapping[str, LayerPlan]) -> dict[str, Split]:
    """How each split layer's weight and bias are cut; transformers' Conv1D has its weight the other way round."""
    splits: dict[str, Split] = {}
    for name, plan in layers.items():
        layer = trace.layers[name]
        out_dim = 1 if layer.kind == "conv1d" else 0
        if plan.kind == "column":
            splits[layer.weight] = Split(out_dim, plan.segments, plan.copies)
            if layer.bias is not None:
                splits[layer.bias] = Split(0, plan.segments, plan.copies)
        elif plan.kind == "row":
            splits[layer.weight] = Split(1 - out_dim, (layer.in_size,))
        elif plan.kind == "vocabulary":
            splits[layer.weight] = Split(0, (layer.in_size,))
    return splits


def _held_by_stages(trace: Trace, bounds: list[int]) -> dict[str, set[int]]:
    """The stages that hold each registered name: those that read it; where none does, those of its other names.

    Code that is no layer may read a tied weight by any name.
    """
    used: dict[str, set[int]] = {}
    for op in trace.ops:
        stage = _stage_of_block(trace.block_of(op.phase), bounds)
        for name in op.parameters:
            names = [name] if op.layer is not None else trace.parameters[trace.canonical(name)].aliases
            for alias in names:
                used.setdefault(alias, set()).add(stage)
    for name, info in trace.parameters.items():
        every = set().union(*(used.get(alias, set()) for alias in info.aliases))
        every = every or _stages_of_unused(trace, name, bounds) or set(range(len(bounds) - 1))
        for alias in info.aliases:
            used.setdefault(alias, every)
    return used


def _stages_of_unused(trace: Trace, name: str, bounds: list[int]) -> set[int]:
    """A parameter of a block that the step never read stays with its block."""
    owner = next((index for index, block in enumerate(trace.blocks) if name.startswith(f"{block.path}.")), None)
    return set() if owner is None else {_stage_of_block(owner, bounds)}


def _stage_of_block(block: int, bounds: list[int]) -> int:
    return max(stage for stage, first in enumerate(bounds[:-1]) if first <= block)
