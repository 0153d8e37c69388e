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
        sweep = _Sweep(trace, forced, whole, hidden)
        for index, op in enumerate(trace.ops):
            sweep.visit(index, op)
        refused = sweep.conclude()
        if not refused:
            sweep.flow.why.update(whole)
            return sweep.flow
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


class _Sweep:
    """One pass over the trace, in its order.

    Args:
        trace: the dry run.
        forced: kinds that the user's plan section names.
        whole: layers that are known to stay whole, and why.
        hidden: numbers of the values that are the hidden state.

    Attributes:
        flow: what is found.
        refused: layers that turn out to have to stay whole, with the reason.
    """

    def __init__(self, trace: Trace, forced: Mapping[str, Kind], whole: Mapping[str, str], hidden: frozenset[int]) -> None:
        self.flow, self.refused = Flow(), dict[str, str]()
        self._trace, self._forced, self._whole, self._hidden = trace, forced, whole, hidden
        self._split: dict[int, frozenset[str]] = {}  # value -> column layers whose split output it holds
        self._home: dict[int, str] = {}  # value -> block that made it
        self._rows: dict[int, str] = {}  # value -> row layer whose output it holds, at most scaled
        self._used: set[str] = set()  # column layers that a row layer reads
        self._kinds: dict[str, set[Kind]] = {}  # of each layer, in all its calls inside the blocks
        self._outside: set[str] = set()  # layers that are called outside of them

    def visit(self, index: int, op: Op) -> None:
        """Follow split activations through the next operation."""
        columns = self.flow.columns[index] = frozenset().union(*(self._split.get(n, _NONE) for n in op.inputs))
        is_inside = self._trace.is_inside_block(op)
        leaves = not is_inside or any(
            n in self._split and n in self._trace.leaving and self._home[n] != op.block for n in op.inputs
        )
        self._home.update(dict.fromkeys(op.outputs, op.block))
        if op.layer is None and len(read := self._read(op)) == 1 and read[0] in self._rows:
            self._rows.update(dict.fromkeys(op.outputs, self._rows[read[0]]))
        if columns and self._trace.again and op.name in _REORDERS and not is_inside:
            self._pass_on(op, columns)
        elif leaves:
            self._leave(op, columns)
        elif op.layer is not None and self._trace.layers[op.layer].kind != "embedding":
            self._call(op, op.layer, columns)
        elif columns:
            self._combine(op, columns)

    def conclude(self) -> dict[str, str]:
        """Layers that have to stay whole and were not known to, with the reason; none where the flow is right."""
        carried = {block.carry_out for block in self._trace.blocks}
        for number in carried & self._split.keys():
            self._refuse(self._split[number], "its output is the output of the block")
        for name, kind in self.flow.kinds.items():
            if kind == "column" and name not in self._used and name not in self._forced:
                self.refused.setdefault(name, "no row layer reads its output")
        kinds = self._kinds
        refused = {name: why for name, why in self.refused.items() if name not in self._whole and "column" in kinds.get(name, ())}
        if refused:
            return refused
        why = "it reads the hidden state in one call and parts of it in another"
        twofold = {name: why for name, found in kinds.items() if len(found) > 1}
        twofold.update(dict.fromkeys(kinds.keys() & self._outside, "it is called both in the blocks and outside"))
        return {name: why for name, why in twofold.items() if name not in {*self._forced, *self._whole}}

    def _leave(self, op: Op, columns: Iterable[str]) -> None:
        """An operation outside of the block that made what it reads."""
        if op.layer is not None:
            self._outside.add(op.layer)
        self._refuse((name for name in columns if name not in self._forced), f"its output leaves the block ({_place(op)})")

    def _call(self, op: Op, layer: str, columns: frozenset[str]) -> None:
        """A call of a Linear: here its kind is decided."""
        kind = self.flow.kinds[layer] = _kind(self._trace.layers[layer], columns, self._forced, self._whole)
        self._kinds.setdefault(layer, set()).add(kind)
        if kind == "row":
            self.flow.feeds[layer] = self.flow.feeds.get(layer, _NONE) | columns
            self._rows[op.outputs[0]] = layer
            self._used |= columns
            return
        if kind == "column":
            self.flow.reads[layer] = op.inputs[0]
            self._split[op.outputs[0]] = frozenset([layer])
        self._refuse(columns, f"its output goes into {_inside(op, layer)}, which is not split by row")

    def _combine(self, op: Op, columns: frozenset[str]) -> None:
        """Any other operation inside a block that reads split activations."""
        if op.name in ("grad", "opaque"):
            what = op.arguments[0] if op.name == "opaque" else "torch.autograd.grad"
            self._refuse(columns, f"its output goes into {what}")
        elif len(columns) > 1 and self._normalizes_outputs(op, columns):
            first = min(columns, key=list(self._kinds).index)  # others may turn out to be row layers
            self._refuse([first], f"its output is added to another's and normalised ({_place(op)})")
        elif not self._meets_hidden(op):
            self._pass_on(op, columns)
            for name in map(self._trace.canonical, op.parameters):  # one gradient is not both partial and summed: readers are alike
                self.flow.feeds[name] = self.flow.feeds.get(name, _NONE) | columns
        elif narrow := self._narrower(op, columns) - self._forced.keys():
            self._refuse(narrow, NARROW)
            self._pass_on(op, columns)  # as it will be then
        else:
            self._refuse(columns, f"its output meets the hidden state before a row layer ({_place(op)})")

    def _pass_on(self, op: Op, columns: frozenset[str]) -> None:
        self._split.update(dict.fromkeys(op.outputs, columns))

    def _refuse(self, columns: Iterable[str], why: str) -> None:
        self.refused.update(dict.fromkeys(columns, why))

    def _read(self, op: Op) -> list[int]:
        """What an operation reads of the hidden state."""
        return [n for n in op.inputs if n in self._hidden]

    def _meets_hidden(self, op: Op) -> bool:
        """Whether it reads the hidden state whole, and more of it than one number for each position."""
        return any(n not in self._split and self._trace.values[n].shape[-1:] not in ((), (1,)) for n in self._read(op))

    def _normalizes_outputs(self, op: Op, columns: frozenset[str]) -> bool:
        """Whether a norm runs over all features that column layers give, rather than over those of a head: it ends a residual."""
        shape = self._trace.values[op.inputs[0]].shape
        return op.name in OVER_LAST and shape[-1] in {self._trace.layers[name].out_size for name in columns}

    def _narrower(self, op: Op, columns: frozenset[str]) -> frozenset[str]:
        """Column layers of pairs whose output meets that of ``columns``, where the pairs have fewer parameters than those."""
        rows = {self._rows[n] for n in self._read(op) if n in self._rows}
        feeding = frozenset().union(*(self.flow.feeds[row] for row in rows))
        is_apart = feeding.isdisjoint(columns)
        return feeding if is_apart and _numel(self._trace, feeding | rows) < _numel(self._trace, columns) else _NONE


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
