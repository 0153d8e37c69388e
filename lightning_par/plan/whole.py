"""What tensor parallelism leaves whole inside the blocks against what one would expect, why, what it costs, what would split it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from lightning_par.plan.plan import Kind, LayerPlan
from lightning_par.plan.tensor_rules import NARROW, read_from_outside
from lightning_par.trace import Trace

_EXPECTED = ("outside the blocks", "not the vocabulary", "as the plan section says", NARROW)
_WORTH_A_NOTE = 0.01  # of all parameters


def kept_whole(trace: Trace, layers: Sequence[LayerPlan], tp: int) -> tuple[str, ...]:
    """Notes for the user, one for each kind of layer or parameter that every tp rank holds and computes in full."""
    if tp == 1:
        return ()
    return (*_layers(trace, layers, tp), *_parameters(trace))


def _layers(trace: Trace, layers: Sequence[LayerPlan], tp: int) -> list[str]:
    alike: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        if layer.kind == "replicate" and layer.why and layer.why not in _EXPECTED:
            alike.setdefault((layer.name.rsplit(".", 1)[-1], layer.why), []).append(layer.name)
    unsplittable = read_from_outside(trace).keys()
    notes = []
    for (leaf, why), names in alike.items():
        numel = sum(trace.parameters[trace.canonical(trace.layers[name].weight)].numel for name in names)
        flops = sum(trace.module_flops.get(name, 0) for name in names)
        cost = f"every rank keeps {numel:,} parameters and {flops / 1e9:.3g} GFLOP of the forward"
        free = [name for name in names if name not in unsplittable and "tied to" not in why]
        free = [name for name in free if trace.layers[name].kind != "embedding" and trace.layers[name].in_size % tp == 0]
        instead = f"; to split it for one more all-reduce, {split_line(free, 'row')}" if free else ""
        notes.append(f"{len(names)} x {leaf} not split over tp: {why}: {cost}{instead}")
    return notes


def _parameters(trace: Trace) -> list[str]:
    """Matrices of the blocks that no layer holds, or that the dry run never came to because the code reads values."""
    of_layers = {trace.canonical(layer.weight) for layer in trace.layers.values()}
    readers = {trace.canonical(name): op for op in trace.ops for name in op.parameters}
    alike: dict[tuple[str, str], list[str]] = {}
    for name, info in trace.parameters.items():
        op = readers.get(name)
        if name in of_layers or len(info.shape) < 2:
            continue
        if op is not None and trace.blocks and op.block:
            why = f"{op.name} reads it, and only Linear, Conv1D and Embedding layers are split"
        elif op is None and trace.first_read is not None:
            why = "the dry run did not come to it, and the code chooses its way by values of tensors"
        else:
            continue
        alike.setdefault((".".join(name.rsplit(".", 2)[-2:]), why), []).append(name)
    total = sum(info.numel for info in trace.parameters.values())
    return _worth_a_note({key: sum(trace.parameters[name].numel for name in names) for key, names in alike.items()}, alike, total)


def _worth_a_note(numel: Mapping[tuple[str, str], int], alike: Mapping[tuple[str, str], Sequence[str]], total: int) -> list[str]:
    return [
        f"{len(names)} x {key[0]} not split over tp: {key[1]}: every rank keeps {numel[key]:,} parameters"
        for key, names in alike.items()
        if numel[key] >= _WORTH_A_NOTE * total
    ]


def split_line(layers: Iterable[str], kind: Kind) -> str:
    """The line of a plan section that splits some layers in one way, with ``*`` for the numbers of blocks."""
    patterns = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in layers})
    return f"plan.split={{{', '.join(f'{pattern}: {kind}' for pattern in patterns)}}}"
