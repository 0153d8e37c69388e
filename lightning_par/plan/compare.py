"""Whether a split module computes the same on plain local tensors: its operations held against the whole module's.

Both dry runs must do the same operations in the same order. In a region of split activations every result must be the
whole one's with exactly one dim divided by tp, no operation may mix along that dim, the positions that a rank holds must
be those that the region's layers expect, and every number that is not a size must be the same. Outside, nothing may
differ. What passes is right by construction; what does not gets activations of global shape instead, whose rules are
right for any code.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from lightning_par.plan.operation import (
    ALONG,
    CUTS,
    JOINS,
    KNOWN,
    MATRIX,
    OVER_LAST,
    RANDOM,
    SHAPE,
    VIEWS,
    dims_along,
    first_normalized_dim,
)
from lightning_par.plan.plan import SequencePlan
from lightning_par.plan.segments import SPLITS, index_at
from lightning_par.runtime.parameter import Split
from lightning_par.trace import Op, Trace

Segments = tuple[int, ...]


def first_difference(
    whole: Trace,
    split: Trace,
    columns: Mapping[int, frozenset[str]],
    local: Mapping[str, Segments],
    tp: int,
    sequence: SequencePlan | None = None,
) -> tuple[int, str] | None:
    """Index of the first op, by the whole trace, that plain local tensors get wrong, with the reason; None when all agree.

    Args:
        whole: the module as the user wrote it.
        split: the same with its planned layers split; it may have ended early with an error.
        columns: for each op of ``whole``, the column layers whose output goes in.
        local: segments of the column layers planned with plain local activations.
        tp: size of the axis.
        sequence: what runs on parts of the sequence.
    """
    held: dict[int, Segments] = {}  # value -> segments along its divided dim
    elsewhere = {name for i, op in enumerate(whole.ops) if not columns.get(i) for name in map(whole.canonical, op.parameters)}
    for index, op in enumerate(whole.ops):
        if index >= len(split.ops):
            return index, f"{op.name} in {op.module} fails on local sizes: {split.error}"
        other = split.ops[index]
        if op.name != other.name or op.module != other.module:
            return index, f"{op.module} takes another way on local sizes ({other.name} instead of {op.name})"
        region = columns.get(index, frozenset()) if whole.is_inside_block(op) else frozenset()
        if op.layer is not None and op.layer in local:
            held[op.outputs[0]] = local[op.layer]
        elif region & local.keys():
            reason = _sums_wrong(whole, op, held, elsewhere) or _wrong(whole, split, op, other, held, tp)
            if reason is not None:
                return index, f"{op.name} in {op.module} {reason}"
        elif not region and not _agrees(whole, split, op, other) and not _is_on_parts(whole, split, op, other, sequence, tp):
            return index, f"{op.name} in {op.module or 'the step'} depends on local sizes"
    return None


def _agrees(whole: Trace, split: Trace, op: Op, other: Op) -> bool:
    """Whether an op outside all regions is the same in both."""
    shapes = all(whole.values[a].shape == split.values[b].shape for a, b in zip(op.outputs, other.outputs, strict=False))
    contents = all(whole.values[a].content == split.values[b].content for a, b in zip(op.inputs, other.inputs, strict=False))
    return shapes and contents and op.arguments == other.arguments


def _is_on_parts(whole: Trace, split: Trace, op: Op, other: Op, sequence: SequencePlan | None, tp: int) -> bool:
    """Whether an op of a module that runs on parts of the sequence gives the part of the whole result."""
    if sequence is None or op.module not in sequence.modules or op.arguments != other.arguments:
        return False
    for a, b in zip(op.outputs, other.outputs, strict=True):
        shape = whole.values[a].shape
        part = Split(sequence.dim, (shape[sequence.dim],)).local_shape(shape, tp)
        if split.values[b].shape != part:
            return False
    return True


def _sums_wrong(whole: Trace, op: Op, held: Mapping[int, Segments], elsewhere: set[str]) -> str | None:
    """Why a gradient would be neither whole on every rank nor a part on every rank."""
    if any(whole.values[number].depends_on_parameters and number not in held for number in op.inputs):
        return "reads a whole tensor made of parameters, whose gradient must be summed over tp"
    shared = elsewhere.intersection(map(whole.canonical, op.parameters))
    return f"reads {min(shared)}, which is also used on whole activations" if shared else None


def _wrong(whole: Trace, split: Trace, op: Op, other: Op, held: dict[int, Segments], tp: int) -> str | None:
    """Why an op of a region is wrong on local tensors; notes what its results hold when it is right."""
    incoming = {number: held[number] for number in op.inputs if number in held}
    if op.layer is not None:
        is_plain = all(len(segments) == 1 for segments in incoming.values())
        return None if is_plain and _agrees(whole, split, op, other) else "does not give the whole result back"
    if op.name not in KNOWN or len(op.inputs) != len(other.inputs):
        return "is not known to work on local parts"
    for a, b in zip(op.inputs, other.inputs, strict=True):
        x, y = whole.values[a], split.values[b]
        if a not in held and (x.shape != y.shape or x.content != y.content):
            return "reads a tensor that was made from local sizes"
    if op.name in RANDOM and _is_random(op):
        return "draws random numbers, which must differ over tp"
    for position, (a, b) in enumerate(zip(op.outputs, other.outputs, strict=False)):
        dim = _split_dim(whole.values[a].shape, split.values[b].shape, tp)
        if dim is None:
            return f"gives {list(split.values[b].shape)} for {list(whole.values[a].shape)}, not one dim divided by {tp}"
        if _mixes(whole, split, op, other, dim, tp):
            return "works along the dim that is split"
        results = {_held_after(whole, split, op, other, number, position, dim, tp, held) for number in incoming}
        if len(results) != 1 or None in results:
            return "takes positions apart that one rank does not hold together"
        held[a] = next(segments for segments in results if segments is not None)
    if not _same_numbers(op, other, tp):
        return f"gets other numbers on local sizes: {other.arguments} for {op.arguments}"
    return None


def _held_after(
    whole: Trace, split: Trace, op: Op, other: Op, number: int, position: int, dim: int, tp: int, held: dict[int, Segments]
) -> Segments | None:
    """Segments along the divided dim ``dim`` of result ``position``, from those of one input; None when they do not fit."""
    before, after = whole.values[number].shape, whole.values[op.outputs[position]].shape
    came = _split_dim(before, split.values[other.inputs[op.inputs.index(number)]].shape, tp)
    segments = held[number]
    if came is None:
        return None
    if op.name in VIEWS:
        return _viewed(before, came, segments, after, dim, tp)
    if before[came] == after[dim]:
        return segments
    if op.name in MATRIX and len(segments) == 1:
        return (after[dim],)  # grouped queries read fewer keys than there are heads
    if op.name not in CUTS:
        return None
    if op.name == "repeat_interleave":
        return None if op.argument(2, "dim") is None else tuple(segment * (after[dim] // before[came]) for segment in segments)
    if op.name in SPLITS:
        start = sum(whole.values[out].shape[dim] for out in op.outputs[:position])
    elif op.name == "narrow":
        start = op.argument(2, "start")
    else:
        entry = index_at(op, came, len(before))
        start, _, step = entry.indices(before[came]) if isinstance(entry, slice) else (-1, 0, 1)
        start = start if step == 1 else -1
    return _taken(segments, start, start + after[dim])


def _viewed(before: Segments, came: int, segments: Segments, after: Segments, dim: int, tp: int) -> Segments | None:
    """Segments of a view. Read flat, who holds what repeats with a period; the view must have the same pattern."""
    unit, new_unit = prod(before[came + 1 :]), prod(after[dim + 1 :])
    flat = tuple(segment * unit for segment in segments)
    period, new_period = sum(flat), after[dim] * new_unit
    count = len(flat) * new_period // period
    pattern = flat * -(-new_period // period)
    if sum(pattern[:count]) != new_period or pattern[:count] * (period // new_period or 1) != pattern:
        return None
    if any(segment % (new_unit * tp) for segment in pattern[:count]):
        return None
    return tuple(segment // new_unit for segment in pattern[:count])


def _taken(segments: Segments, start: int, stop: int) -> Segments | None:
    """The whole segments between two positions."""
    ends = [sum(segments[:index]) for index in range(len(segments) + 1)]
    return segments[ends.index(start) : ends.index(stop)] if start in ends and stop in ends else None


def _split_dim(whole: tuple[int, ...], split: tuple[int, ...], tp: int) -> int | None:
    """The one dim that is divided by tp, or None."""
    if len(whole) != len(split):
        return None
    different = [dim for dim, (a, b) in enumerate(zip(whole, split, strict=True)) if a != b]
    return different[0] if len(different) == 1 and whole[different[0]] == tp * split[different[0]] else None


def _mixes(whole: Trace, split: Trace, op: Op, other: Op, dim: int | None, tp: int) -> bool:
    """Whether the op computes across positions of the divided dim, which is ``dim`` of its result."""
    ndim = len(whole.values[op.outputs[0]].shape)
    if op.name not in JOINS:  # a reduction counts the dims of what it reads
        shape = whole.values[op.inputs[0]].shape
        dim, ndim = _split_dim(shape, split.values[other.inputs[0]].shape, tp), len(shape)
    if op.name in ALONG:
        return any(not isinstance(d, int) or d % ndim == dim for d in dims_along(op))
    if op.name == "scaled_dot_product_attention":  # over the last two dims
        return dim is None or dim >= ndim - 2
    if op.name == "einsum":
        return _sums_in_einsum(whole, split, op, other, tp)
    if op.name in OVER_LAST and dim is not None:
        return dim >= first_normalized_dim(op, ndim)
    return False


def _sums_in_einsum(whole: Trace, split: Trace, op: Op, other: Op, tp: int) -> bool:
    """Whether an ``einsum`` sums over the label that is divided, or cannot be read."""
    operands, arrow, result = str(op.arguments[0]).replace(" ", "").partition("->")
    labels = operands.split(",")
    if not arrow or "." in operands or op.parameters or len(labels) != len(op.inputs):
        return True
    dims = [_split_dim(whole.values[a].shape, split.values[b].shape, tp) for a, b in zip(op.inputs, other.inputs, strict=True)]
    divided = {names[dim] for names, dim in zip(labels, dims, strict=True) if dim is not None}
    return len(divided) != 1 or not divided <= set(result)


def _is_random(op: Op) -> bool:
    if op.name == "dropout":
        return bool(op.argument(1, "p", 0.5)) and op.argument(2, "training", True) is not False
    return bool(op.argument(4, "dropout_p", 0.0))


def _same_numbers(op: Op, other: Op, tp: int) -> bool:
    a, b = list(_numbers(op.arguments)), list(_numbers(other.arguments))
    if len(a) != len(b):
        return False
    may_shrink = op.name in SHAPE
    return all(x == y or (may_shrink and type(x) is int and x == tp * y) for x, y in zip(a, b, strict=True))


def _numbers(value: Any) -> Any:
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value
