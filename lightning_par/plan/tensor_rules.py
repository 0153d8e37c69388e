"""Which Linear layers are split by column and which by row, read off the trace.

A Linear that reads the residual stream is column-parallel; one that reads only outputs of column-parallel layers is
row-parallel (the pairing of arXiv 1909.08053, section 3). A column layer whose output meets the stream before a row
layer takes it in stays whole; where the stream is the output of a smaller pair beside it, as of a low-rank adapter, the
pair's first half does instead, and its second is split as the layer is. On Llama, GPT-2, Gemma 2 and BERT this gives the
hand-written plans.

[Note: neutral values] Masks, positions and rotary tables depend on no parameter: they are the same on every tp rank and
may meet split activations. So may tables that are made of parameters and not of the hidden state, such as relative position
biases, and one number for each position, such as a gate: they meet activations of global shape, whose rules give each rank
its part and sum the gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lightning_par.plan.operation import OVER_LAST
from lightning_par.plan.plan import Kind
from lightning_par.plan.stream import hidden_values
from lightning_par.trace import Layer, Op, Trace

NARROW = "narrower than the layer beside it"
_NONE: frozenset[str] = frozenset()
_REORDERS = {"index_select"}  # between two passes over the blocks, the samples of what they have cached: a beam search


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
    hidden = hidden_values(trace)
    whole = read_from_outside(trace)
    whole.update({name: "as the plan section says" for name, kind in forced.items() if kind == "replicate"})
    while True:
        flow, refused = _sweep(trace, forced, whole, hidden)
        if not refused:
            flow.why.update(whole)
            return flow
        whole.update(refused)


def read_from_outside(trace: Trace) -> dict[str, str]:
    """Layers whose weight or bias is read by other code than the layer itself, and which must therefore stay whole; and why."""
    owners: dict[str, list[tuple[str, str]]] = {}
    for name, layer in trace.layers.items():
        for what, key in (("weight", layer.weight), ("bias", layer.bias)):
            if key is not None:
                owners.setdefault(trace.canonical(key), []).append((name, what))
    reasons = {key: f"is bound: {what}" for key, what in trace.bound.items()}
    for op in trace.ops:
        for alias in op.parameters if op.layer is None else ():
            reasons[trace.canonical(alias)] = f"is read by {_place(op)}"
    return {name: f"its {what} {why}" for key, why in reasons.items() for name, what in owners.get(key, ())}


def _sweep(
    trace: Trace, forced: Mapping[str, Kind], whole: Mapping[str, str], hidden: frozenset[int]
) -> tuple[Flow, dict[str, str]]:
    """One pass over the trace. Returns the flow, and layers that turn out to have to stay whole, with the reason."""
    flow = Flow()
    refused: dict[str, str] = {}
    split: dict[int, frozenset[str]] = {}  # value -> column layers whose split output it holds
    home: dict[int, str] = {}  # value -> block that made it
    rows: dict[int, str] = {}  # value -> row layer whose output it holds, at most scaled
    used: set[str] = set()
    kinds: dict[str, set[Kind]] = {}
    outside: set[str] = set()
    for index, op in enumerate(trace.ops):
        columns = frozenset().union(*(split.get(n, _NONE) for n in op.inputs))
        stream = any(n in hidden and n not in split and trace.values[n].shape[-1:] not in ((), (1,)) for n in op.inputs)
        crosses = any(n in split and n in trace.leaving and home[n] != op.block for n in op.inputs)
        flow.columns[index] = columns
        home.update(dict.fromkeys(op.outputs, op.block))
        read = [n for n in op.inputs if n in hidden]
        if op.layer is None and len(read) == 1 and read[0] in rows:
            rows.update(dict.fromkeys(op.outputs, rows[read[0]]))
        if columns and trace.again and op.name in _REORDERS and not trace.is_inside_block(op):
            split.update(dict.fromkeys(op.outputs, columns))
        elif crosses or not trace.is_inside_block(op):
            if op.layer is not None:
                outside.add(op.layer)
            refused.update({name: f"its output leaves the block ({_place(op)})" for name in columns if name not in forced})
        elif op.layer is not None and trace.layers[op.layer].kind != "embedding":
            kind = _kind(trace.layers[op.layer], columns, forced, whole)
            flow.kinds[op.layer] = kind
            kinds.setdefault(op.layer, set()).add(kind)
            if kind == "row":
                flow.feeds[op.layer] = flow.feeds.get(op.layer, _NONE) | columns
                rows[op.outputs[0]] = op.layer
                used |= columns
            elif kind == "column":
                flow.reads[op.layer] = op.inputs[0]
                split[op.outputs[0]] = frozenset([op.layer])
            if kind != "row":
                refused.update(
                    {name: f"its output goes into {_inside(op, op.layer)}, which is not split by row" for name in columns}
                )
        elif op.name in ("grad", "opaque"):
            what = op.arguments[0] if op.name == "opaque" else "torch.autograd.grad"
            refused.update(dict.fromkeys(columns, f"its output goes into {what}"))
        elif len(columns) > 1 and _normalizes_outputs(trace, op, columns):
            why = f"its output is added to another's and normalised ({_place(op)})"
            refused[min(columns, key=list(kinds).index)] = why  # the first; others may turn out to be row layers
        elif (
            columns and stream and (narrow := _narrower(trace, {rows[n] for n in read if n in rows}, columns, flow) - forced.keys())
        ):
            refused.update(dict.fromkeys(narrow, NARROW))
            split.update(dict.fromkeys(op.outputs, columns))  # as it will be then
        elif columns and stream:
            refused.update({name: f"its output meets the hidden state before a row layer ({_place(op)})" for name in columns})
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
    refused = {name: why for name, why in refused.items() if name not in whole and "column" in kinds.get(name, ())}
    twofold = {name: "it reads the hidden state in one call and parts of it in another" for name in kinds if len(kinds[name]) > 1}
    twofold.update(dict.fromkeys(kinds.keys() & outside, "it is called both in the blocks and outside"))
    return flow, refused or {name: why for name, why in twofold.items() if name not in {*forced, *whole}}


def _normalizes_outputs(trace: Trace, op: Op, columns: frozenset[str]) -> bool:
    """Whether a norm runs over all features that column layers give, rather than over those of a head: it ends a residual."""
    shape = trace.values[op.inputs[0]].shape
    return op.name in OVER_LAST and shape[-1] in {trace.layers[name].out_size for name in columns}


def _narrower(trace: Trace, rows: set[str], columns: frozenset[str], flow: Flow) -> frozenset[str]:
    """The column layers that feed ``rows``, where these pairs have fewer parameters than ``columns``, which they meet."""
    feeding = frozenset().union(*(flow.feeds[row] for row in rows))
    is_apart = feeding.isdisjoint(columns)
    return feeding if is_apart and _numel(trace, feeding | rows) < _numel(trace, columns) else _NONE


def _numel(trace: Trace, layers: Iterable[str]) -> int:
    return sum(trace.layers[name].in_size * trace.layers[name].out_size for name in layers)


def _kind(layer: Layer, columns: frozenset[str], forced: Mapping[str, Kind], whole: Mapping[str, str]) -> Kind:
    if layer.name in forced:
        return forced[layer.name]
    if layer.name in whole or (layer.out_size == 1 and not columns):
        return "replicate"
    return "row" if columns else "column"


def _place(op: Op) -> str:
    return f"{op.name} in {_inside(op, op.module) or 'the step'}"


def _inside(op: Op, path: str) -> str:
    """A module's path seen from its block, so that equal blocks have equal reasons."""
    return "the block" if path == op.block != "" else path.removeprefix(f"{op.block}.")
