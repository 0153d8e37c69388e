"""The vocabulary axis: the embedding of the tokens and the head that predicts them, split over tp by rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_par.plan.plan import Kind, LayerPlan
from lightning_par.trace import Layer, Op, Trace


def infer_vocabulary(trace: Trace, forced: Mapping[str, Kind]) -> dict[str, tuple[Kind, str]]:
    """Kinds of the embeddings outside the blocks and of the Linear layers after them, each with the reason.

    A Linear after the blocks with as many outputs as the vocabulary has rows is its head. Position and type embeddings,
    classifiers and poolers stay whole.
    """
    outside = {op.layer: op for op in trace.ops if op.layer is not None and not (op.block and trace.blocks)}
    vocabulary = _vocabulary(trace, outside)
    kinds: dict[str, tuple[Kind, str]] = {}
    for name, op in outside.items():
        layer = trace.layers[name]
        if name in forced:
            kinds[name] = (forced[name], "as the plan section says")
        elif layer is vocabulary or _are_tied(trace, layer, vocabulary):
            kinds[name] = ("vocabulary", f"embeds the {layer.in_size} tokens")
        elif layer.kind == "embedding":
            kinds[name] = ("replicate", "not the vocabulary")
        elif _is_after_blocks(trace, op) and vocabulary is not None and layer.out_size == vocabulary.in_size:
            kinds[name] = ("column", f"predicts the {layer.out_size} tokens")
        elif trace.blocks:
            kinds[name] = ("replicate", "outside the blocks")
    return kinds


def _vocabulary(trace: Trace, outside: Mapping[str, Op]) -> Layer | None:
    """The largest embedding that is indexed by a tensor of the batch.

    One that is indexed by what the step computes from the batch counts where it has a head (tokens masked in the step) or
    where there is no other (positions counted from a mask are no vocabulary).
    """
    embeddings = {name: op for name, op in outside.items() if trace.layers[name].kind == "embedding"}
    head_sizes = {trace.layers[name].out_size for name, op in outside.items() if _is_after_blocks(trace, op)}
    computed = _computed_from_batch(trace)
    likely, possible = [], []
    for name, op in embeddings.items():
        layer = trace.layers[name]
        is_computed = bool(computed.intersection(op.inputs))
        if any(trace.values[n].is_batch for n in op.inputs) or (is_computed and layer.in_size in head_sizes):
            likely.append(layer)
        elif is_computed:
            possible.append(layer)
    return max(likely or possible, key=lambda layer: layer.in_size * layer.out_size, default=None)


def _is_after_blocks(trace: Trace, op: Op) -> bool:
    return bool(trace.blocks) and op.phase == 2 * trace.num_blocks


def _computed_from_batch(trace: Trace) -> set[int]:
    """The values that code without parameters makes from the batch, with the batch itself."""
    computed = {number for number, value in enumerate(trace.values) if value.is_batch}
    for op in trace.ops:
        if not op.parameters and op.layer is None and computed.intersection(op.inputs):
            computed.update(op.outputs)
    return computed


def agree_on_ties(trace: Trace, kinds: Mapping[str, tuple[Kind, str]]) -> dict[str, tuple[Kind, str]]:
    """The kinds, but for layers of one tied weight that would be cut along different dims: these all stay whole."""
    agreed = dict(kinds)
    for info in trace.parameters.values():
        tied = [name for name in kinds if trace.layers[name].weight in info.aliases]
        if len({_cut_dim(trace.layers[name], kinds[name][0]) for name in tied}) > 1:
            agreed.update({name: ("replicate", f"tied to {' and '.join(n for n in tied if n != name)}") for name in tied})
    return agreed


def padded(trace: Trace, layers: Sequence[LayerPlan], tp: int) -> tuple[str, ...]:
    """Notes on embeddings and heads whose rows do not divide by tp, so that the last ranks hold rows of zeros at their end."""
    alike: dict[int, list[str]] = {}
    for layer in layers:
        rows = trace.layers[layer.name].in_size if layer.kind == "vocabulary" else trace.layers[layer.name].out_size
        if layer.kind in ("column", "vocabulary") and rows % tp and not layer.copies:
            alike.setdefault(rows, []).append(layer.name)
    return tuple(
        f"{rows} rows of {' and '.join(names)} do not divide by tp={tp}: padded by {-rows % tp} of zeros, which nothing reads or "
        f"trains, to {-(-rows // tp)} on every rank"
        for rows, names in alike.items()
    )


def _are_tied(trace: Trace, layer: Layer, vocabulary: Layer | None) -> bool:
    """Whether an embedding looks up the vocabulary under another name, such as a decoder's beside its encoder's."""
    return (
        layer.kind == "embedding"
        and vocabulary is not None
        and layer.weight in trace.parameters[trace.canonical(vocabulary.weight)].aliases
    )


def _cut_dim(layer: Layer, kind: Kind) -> int | None:
    """The dim of the weight that is cut over tp."""
    if kind == "replicate":
        return None
    return int(kind == "row") ^ int(layer.kind == "conv1d")
