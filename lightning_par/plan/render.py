"""The plan as tables for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from itertools import groupby
from operator import itemgetter

from rich.console import Console
from rich.table import Table

from lightning_par.plan.plan import ChainPlan, ParameterPlan, Plan

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def render_plan(plan: Plan, width: int = 132, color: bool = False) -> str:
    """The plan as text: the stages, then every weight with its split and the ranks that hold it."""
    console = Console(file=StringIO(), width=width, force_terminal=color, highlight=False)
    layout = plan.layout
    console.print(
        f"{plan.module} as [bold]{layout}[/bold] on {layout.world_size} ranks: tp {layout.tp} x pp {layout.pp} x dp "
        f"{layout.dp or 1}, zero {layout.zero}, {layout.microbatches} microbatches"
    )
    console.print(_stages(plan))
    if plan.chain is not None and set(plan.chain.recompute) != {"none"}:
        console.print(f"recompute: {_recompute(plan.chain)}", markup=False)
    if plan.chain is not None and any(plan.chain.offload_activations):
        offloaded = [path for path, chosen in zip(plan.chain.blocks, plan.chain.offload_activations, strict=True) if chosen]
        console.print(f"activations wait on the host: {_spans(offloaded)}", markup=False)
    if plan.memory:
        console.print(_memory(plan))
    for line in _carried(plan):
        console.print(line, markup=False)
    if plan.sequence is not None:
        console.print(f"sequence: hidden states cut along dim {plan.sequence.dim}, run on parts: {_modules(plan)}", markup=False)
    console.print(_weights(plan))
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    output = console.file
    assert isinstance(output, StringIO)
    return output.getvalue()


def _stages(plan: Plan) -> Table:
    table = Table("stage", "blocks", "ranks", title="Stages", title_justify="left")
    for heading in ("parameters", "bytes per rank", "forward GFLOP", "saved activations"):
        table.add_column(heading, justify="right")
    for index, stage in enumerate(plan.stages):
        blocks = "all" if plan.chain is None else _spans(plan.chain.blocks[stage.first : stage.last])
        numbers = (
            f"{stage.num_parameters:,}",
            format_bytes(stage.parameter_bytes),
            f"{stage.flops / 1e9:.3g}",
            format_bytes(stage.saved_bytes),
        )
        table.add_row(str(index), blocks, _ranks(plan, (plan.layout.pp_of(index),)), *numbers)
    return table


def _memory(plan: Plan) -> Table:
    """What each rank stores, by kind, and at its peak."""
    table = Table("pp", "ranks", title="Memory of a rank", title_justify="left")
    has_gathered = any(memory.gathered for memory in plan.memory)
    kinds = ["parameters", "gradients", "states", "activations", "working"] + ["gathered"] * has_gathered
    for heading in (*kinds, "peak"):
        table.add_column(heading, justify="right")
    for pp, memory in enumerate(plan.memory):
        numbers = (format_bytes(size) for size in (*(getattr(memory, kind) for kind in kinds), memory.total))
        table.add_row(str(pp), _ranks(plan, (pp,)), *numbers)
    return table


def _recompute(chain: ChainPlan) -> str:
    """``model.layers.0 none, model.layers.[1-3] full``."""
    parts = []
    for mode, group in groupby(zip(chain.blocks, chain.recompute, strict=True), key=itemgetter(1)):
        parts.append(f"{_spans([path for path, _ in group])} {mode}")
    return ", ".join(parts)


def _carried(plan: Plan) -> Iterator[str]:
    """What crosses each boundary beside the hidden state: ``into stage 1: encoder.block.0[1], decoder.block.1(bias)``."""
    for stage, received in enumerate(plan.boundaries, start=1):
        places = [
            f"{one.module}({_keys(one.path)})" if one.place == "argument" else f"{one.module}[{_keys(one.path)}]".removesuffix("[]")
            for one in received
        ]
        if places:
            yield f"into stage {stage}, beside the hidden state: {', '.join(places)}"


def _keys(path: Sequence[int | str]) -> str:
    return ".".join(map(str, path))


def _modules(plan: Plan) -> str:
    """The modules that run on parts of the sequence, those of all blocks as one."""
    assert plan.sequence is not None
    names = dict.fromkeys(_in_any_block(plan, name) for name in plan.sequence.modules)
    return ", ".join(names) or "none"


def _in_any_block(plan: Plan, name: str) -> str:
    """A name with ``*`` for the number of its block."""
    paths = () if plan.chain is None else plan.chain.paths
    prefix = next((f"{path}." if path else "" for path in paths if name.startswith(f"{path}." if path else "")), None)
    return name if prefix is None else prefix + re.sub(r"^\d+\.", "*.", name[len(prefix) :])


def _weights(plan: Plan) -> Table:
    where = "stages" if plan.layout.vp == 1 else "pp"
    table = Table("weight", "shape", "split over tp", "activations", where, "ranks", title="Weights", title_justify="left")
    for name, group in _grouped(plan).items():
        first = group[0]
        stages = tuple(sorted({stage for parameter in group for stage in parameter.spec.stages}))
        table.add_row(name, " x ".join(map(str, first.spec.shape)), *_split(plan, first), _listed(stages), _ranks(plan, stages))
    return table


def _split(plan: Plan, parameter: ParameterPlan) -> tuple[str, str]:
    spec = parameter.spec
    layer = next((found for alias, _ in parameter.aliases if (found := plan.layer(alias.rpartition(".")[0]))), None)
    if spec.split is None:
        whole = "whole, gradient summed over tp" if spec.partial else "whole"
        return (f"{whole}: {layer.why}" if layer and layer.kind == "replicate" and layer.why else whole), ""
    kind = layer.kind if layer else "split"
    segments = spec.split.segments
    fused = f", {len(segments)} fused parts of {', '.join(map(str, segments))}" if len(segments) > 1 else ""
    added = sum(-segment % plan.layout.tp for segment in segments)
    padded = f", padded by {added}" if added and not spec.split.copies else ""
    copied = f", in {', '.join(map(str, spec.split.copies))} copies" if spec.split.copies else ""
    return (
        f"{kind}: dim {spec.split.dim} / {plan.layout.tp}{fused}{copied}{padded}",
        layer.activation if layer and layer.kind == "column" else "",
    )


def _grouped(plan: Plan) -> dict[str, list[ParameterPlan]]:
    """Parameters by name, those of equal blocks under one name with the range of block numbers."""
    groups: dict[tuple[object, ...], list[ParameterPlan]] = {}
    for parameter in plan.parameters:
        spec = parameter.spec
        name = spec.name
        if len(spec.stages) == 1:
            name = _in_any_block(plan, name)
        groups.setdefault((name, spec.shape, _split(plan, parameter)), []).append(parameter)
    return {_group_name(str(key[0]), group): group for key, group in groups.items()}


def _group_name(pattern: str, group: list[ParameterPlan]) -> str:
    tied = [alias for alias, _ in group[0].aliases[1:]]
    if "*" not in pattern:
        return pattern + (f" = {', '.join(tied)}" if tied else "")
    prefix = pattern.partition("*")[0]
    numbers = sorted(int(parameter.spec.name[len(prefix) :].partition(".")[0]) for parameter in group)
    return pattern.replace("*", f"[{numbers[0]}-{numbers[-1]}]" if len(numbers) > 1 else str(numbers[0]), 1)


def _ranks(plan: Plan, stages: tuple[int, ...]) -> str:
    layout = plan.layout
    return _listed(layout.rank_of(p, d, t) for p in stages for d in range(layout.dp or 1) for t in range(layout.tp))


def _listed(numbers: Iterable[int]) -> str:
    """``0-3`` for four ranks in a row; without gaps that reads better than a list."""
    values = list(numbers)
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}-{values[-1]}"
    return ", ".join(map(str, values))


def _spans(blocks: Sequence[str]) -> str:
    """``encoder.block.3, decoder.block.[0-2]`` for blocks in a row."""
    parts = []
    for container, group in groupby(blocks, key=lambda path: path.rpartition(".")[0]):
        names = [path.rpartition(".")[2] for path in group]
        numbers = f"[{names[0]}-{names[-1]}]" if len(names) > 1 else names[0]
        parts.append(f"{container}.{numbers}".lstrip("."))
    return ", ".join(parts)


def format_bytes(count: float) -> str:
    """``1.5 MiB`` for 1572864."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"
