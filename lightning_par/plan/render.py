"""The plan as tables for a terminal, one of them a tree of modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from itertools import groupby
from operator import itemgetter

from rich.console import Console
from rich.table import Table

from lightning_par.plan.plan import ChainPlan, Plan
from lightning_par.plan.tree import ModuleNode, in_row, is_next, module_tree

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def render_plan(plan: Plan, width: int = 132, color: bool = False) -> str:
    """The plan as text: the stages, the memory of ranks, and the tree of modules with their splits."""
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
        console.print(f"activations wait on the host: {block_spans(offloaded)}", markup=False)
    if plan.memory:
        console.print(_memory(plan))
    for line in _carried(plan):
        console.print(line, markup=False)
    if plan.sequence is not None:
        console.print(f"sequence: hidden states are cut along dim {plan.sequence.dim} between the blocks", markup=False)
    console.print(_modules(plan))
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
        blocks = "all" if plan.chain is None else block_spans(plan.chain.blocks[stage.first : stage.last])
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
        parts.append(f"{block_spans([path for path, _ in group])} {mode}")
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


def _modules(plan: Plan) -> Table:
    """A line for each module with parameters; equal neighbours of a list share one."""
    where = "stages" if plan.layout.vp == 1 else "pp"
    table = Table(title="Modules", title_justify="left")
    table.add_column("module", no_wrap=True)
    for heading in ("weight", "activations", where):
        table.add_column(heading)
    for heading in ("parameters", "bytes\nper rank", "forward\nGFLOP"):
        table.add_column(heading, justify="right")
    tree = module_tree(plan)
    for branch, node in [("", tree), *_branches(tree)]:
        numbers = (
            f"{node.num_elements:,}",
            format_bytes(max(node.bytes_by_pp)),
            f"{node.flops / 1e9:.3g}" if node.flops else "",
        )
        table.add_row(f"{branch}{node.name}", node.weight, node.activation, listed(node.stages), *numbers)
    return table


def _branches(node: ModuleNode, above: str = "") -> Iterator[tuple[str, ModuleNode]]:
    """All nodes below one, each with what is drawn before its name; ``above`` begins all of it."""
    for child in node.children:
        is_last = child is node.children[-1]
        yield f"{above}{'└─ ' if is_last else '├─ '}", child
        yield from _branches(child, above + ("   " if is_last else "│  "))


def _ranks(plan: Plan, stages: tuple[int, ...]) -> str:
    layout = plan.layout
    return listed(layout.rank_of(p, d, t) for p in stages for d in range(layout.dp or 1) for t in range(layout.tp))


def listed(numbers: Iterable[int]) -> str:
    """``0-3`` for four ranks in a row; without gaps that reads better than a list."""
    values = list(numbers)
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}-{values[-1]}"
    return ", ".join(map(str, values))


def block_spans(blocks: Sequence[str]) -> str:
    """``encoder.block.3, decoder.block.[0-2]``: those with numbers in a row together."""
    spans: list[tuple[str, list[str]]] = []
    for path in blocks:
        container, _, name = path.rpartition(".")
        if spans and spans[-1][0] == container and is_next(spans[-1][1][-1], name):
            spans[-1][1].append(name)
        else:
            spans.append((container, [name]))
    return ", ".join(f"{container}.{in_row(names)}".lstrip(".") for container, names in spans)


def format_bytes(count: float) -> str:
    """``1.5 MiB`` for 1572864."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"
