"""Which Linear layers are split by column and which by row, read off the trace.

A Linear that reads the residual stream is column-parallel; one that reads only outputs of column-parallel layers is
row-parallel (the pairing of arXiv 1909.08053, section 3). A column layer whose output meets the stream before a row
layer takes it in stays whole. On Llama, GPT-2, Gemma 2 and BERT this gives the hand-written plans.

[Note: neutral values] Masks, positions and rotary tables depend on no parameter: they are the same on every tp rank and
may meet split activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_par.plan.plan import Kind
from lightning_par.trace import Op, Trace

_NONE: frozenset[str] = frozenset()


@dataclass
class Flow:
    """How split activations run through the blocks.

    Attributes:
        kinds: column, row or replicate, for each Linear inside a block.
        why: the reason where a layer stays whole.
        columns: for each op, the column layers whose split output goes in.
        feeds: for each row layer, the column layers that it reads; likewise for a parameter read next to split activations.
        reads: for each column layer, the number of the value that it reads.
    """

    kinds: dict[str, Kind] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    columns: dict[int, frozenset[str]] = field(default_factory=dict)
    feeds: dict[str, frozenset[str]] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)

    def region(self, layer: str) -> frozenset[str]:
        """All column and row layers that are joined by split activations with ``layer``."""
        region = {layer}
        while True:
            joined = {name for row, columns in self.feeds.items() if region & {row, *columns} for name in (row, *columns)}
            if joined <= region:
                return frozenset(region)
            region |= joined


def infer_flow(trace: Trace, forced: Mapping[str, Kind]) -> Flow:
    """Decide column, row or replicate for every Linear inside the blocks.

    Args:
        trace: the dry run.
        forced: kinds that the user's plan section names; they are kept.
    """
    whole: dict[str, str] = {name: "as the plan section says" for name, kind in forced.items() if kind == "replicate"}
    while True:
        flow, refused = _sweep(trace, forced, whole)
        if not refused:
            flow.why.update(whole)
            return flow
        whole.update(refused)


def _sweep(trace: Trace, forced: Mapping[str, Kind], whole: Mapping[str, str]) -> tuple[Flow, dict[str, str]]:
    """One pass over the trace. Returns the flow, and layers that turn out to have to stay whole, with the reason."""
    flow = Flow()
    refused: dict[str, str] = {}
    split: dict[int, frozenset[str]] = {}  # value -> column layers whose split output it holds
    used: set[str] = set()
    for index, op in enumerate(trace.ops):
        inside = trace.is_inside_block(op.phase)
        columns = frozenset().union(*(split.get(n, _NONE) for n in op.inputs))
        stream = any(trace.values[n].depends_on_parameters and n not in split for n in op.inputs)
        flow.columns[index] = columns
        if not inside:
            refused.update({name: f"its output leaves the block ({_place(trace, op)})" for name in columns if name not in forced})
        elif op.layer is not None and trace.layers[op.layer].kind != "embedding":
            kind = _kind(op.layer, columns, forced, whole)
            flow.kinds[op.layer] = kind
            if kind == "row":
                flow.feeds[op.layer] = flow.feeds.get(op.layer, _NONE) | columns
                used |= columns
            elif kind == "column":
                flow.reads[op.layer] = op.inputs[0]
                split[op.outputs[0]] = frozenset([op.layer])
            if kind != "row":
                refused.update(
                    {
                        name: f"its output goes into {_inside(trace, op.phase, op.layer)}, which is not split by row"
                        for name in columns
                    }
                )
        elif columns and stream:
            refused.update(
                {name: f"its output meets the hidden state before a row layer ({_place(trace, op)})" for name in columns}
            )
        elif columns:
            split.update(dict.fromkeys(op.outputs, columns))
            for name in map(trace.canonical, op.parameters):  # one gradient is not both partial and summed: its readers are alike
                flow.feeds[name] = flow.feeds.get(name, _NONE) | columns
    carried = {block.carry_out for block in trace.blocks}
    for number in carried & split.keys():
        refused.update(dict.fromkeys(split[number], "its output is the output of the block"))
    for name, kind in flow.kinds.items():
        if kind == "column" and name not in used and name not in forced:
            refused.setdefault(name, "no row layer reads its output")
    return flow, {name: reason for name, reason in refused.items() if name not in whole and flow.kinds.get(name) == "column"}


def _kind(layer: str, columns: frozenset[str], forced: Mapping[str, Kind], whole: Mapping[str, str]) -> Kind:
    if layer in forced:
        return forced[layer]
    if columns:
        return "row"
    return "replicate" if layer in whole else "column"


def _place(trace: Trace, op: Op) -> str:
    return f"{op.name} in {_inside(trace, op.phase, op.module) or 'the step'}"


def _inside(trace: Trace, phase: int, path: str) -> str:
    """A module's path seen from its block, so that equal blocks have equal reasons."""
    block = trace.blocks[phase // 2].path if phase % 2 and trace.blocks else ""
    return "the block" if path == block != "" else path.removeprefix(f"{block}.")
