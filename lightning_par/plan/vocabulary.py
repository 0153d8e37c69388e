"""The vocabulary axis: the embedding of the tokens and the head that predicts them, split over tp by rows."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_par.plan.plan import Kind
from lightning_par.trace import Trace


def infer_vocabulary(trace: Trace, forced: Mapping[str, Kind]) -> dict[str, tuple[Kind, str]]:
    """Kinds of the embeddings outside the blocks and of the Linear layers after them, each with the reason.

    The vocabulary is the largest embedding outside the blocks that is indexed by a tensor of the batch. A Linear after
    the blocks with as many outputs is its head. Position and type embeddings, classifiers and poolers stay whole.
    """
    outside = {op.layer: op for op in trace.ops if op.layer is not None and not (op.phase % 2 and trace.blocks)}
    embeddings = [
        trace.layers[name]
        for name, op in outside.items()
        if trace.layers[name].kind == "embedding" and any(trace.values[n].is_batch for n in op.inputs)
    ]
    vocabulary = max(embeddings, key=lambda layer: layer.in_size * layer.out_size, default=None)
    kinds: dict[str, tuple[Kind, str]] = {}
    for name, op in outside.items():
        layer = trace.layers[name]
        if name in forced:
            kinds[name] = (forced[name], "as the plan section says")
        elif layer is vocabulary:
            kinds[name] = ("vocabulary", f"embeds the {layer.in_size} tokens")
        elif layer.kind == "embedding":
            kinds[name] = ("replicate", "not the vocabulary")
        elif trace.blocks and op.phase == 2 * trace.num_blocks and vocabulary is not None and layer.out_size == vocabulary.in_size:
            kinds[name] = ("column", f"predicts the {layer.out_size} tokens")
        elif trace.blocks:
            kinds[name] = ("replicate", "outside the blocks")
    return _agree_on_ties(trace, kinds)


def _agree_on_ties(trace: Trace, kinds: dict[str, tuple[Kind, str]]) -> dict[str, tuple[Kind, str]]:
    """Layers of one tied weight are split alike, or all stay whole."""
    for info in trace.parameters.values():
        tied = [name for name in kinds if trace.layers[name].weight in info.aliases]
        if len({kinds[name][0] == "replicate" for name in tied}) > 1:
            kinds.update({name: ("replicate", f"tied to {' and '.join(n for n in tied if n != name)}") for name in tied})
    return kinds
