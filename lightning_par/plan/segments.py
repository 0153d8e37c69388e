"""Fused outputs and heads of a column layer, read off what the code does with its output."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import prod

from lightning_par.trace import Layer, Op, Trace

SPLITS = {"split", "chunk", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"}
_VIEWS = ("view", "reshape", "unflatten")
_KEEPS_DIMS = {"contiguous", "clone", "to", "float", "half", "bfloat16", "permute", "transpose", "swapaxes"}


@dataclass(frozen=True)
class OutputUse:
    """What the code does with the last dim of a column layer's output.

    Attributes:
        segments: sizes of the fused parts; one part when nothing is fused.
        heads: heads that each part is viewed as, one number for each; 0 where it is not viewed as heads.
    """

    segments: tuple[int, ...]
    heads: tuple[int, ...]

    def copies(self, tp: int, queries: int) -> tuple[int, ...]:
        """For each part, the ranks in a row that hold the same share of it.

        That is more than one for key and value heads that are fewer than the ranks, but divide them. Query heads in a row
        read one key head, so that the ranks that hold a key head hold the query heads that read it.

        Args:
            tp: ranks.
            queries: query heads that may read these heads; they must divide by ``tp`` themselves.
        """
        return tuple(
            tp // heads if 0 < heads < min(tp, queries) and not (tp % heads or queries % heads or queries % tp) else 1
            for heads in self.heads
        )


def output_use(trace: Trace, layer: Layer, output: int) -> OutputUse:
    """Follow the output of a layer to where its last dim is split or viewed.

    A fused projection is written in one of four ways::

        y.split / chunk / y[..., a:b]                 parts of the last dim
        y.view(..., parts, heads, size), taken apart  parts first
        y.view(..., heads, size).split(sizes, -2)     heads of several kinds
        y.view(..., heads, parts * size)              heads first: no segments, every rank holds whole heads
    """
    parts = _parts(trace, output, len(trace.values[output].shape) - 1)
    if parts:
        return OutputUse(tuple(size for size, _ in parts), tuple(_heads(trace, part) for _, part in parts))
    view = _first_view(trace, output)
    if view is None:
        return OutputUse((layer.out_size,), (0,))
    shape = trace.values[view.outputs[0]].shape
    trailing = _trailing(trace, view, layer.out_size)
    dim = len(shape) - len(trailing)
    unit = layer.out_size // trailing[0]
    sizes = [size for size, _ in _parts(trace, view.outputs[0], dim)]
    if not sizes:
        return OutputUse((layer.out_size,), (trailing[0],))
    inner = trailing[1] if len(trailing) > 2 else 0
    are_heads = max(sizes) > 1
    return OutputUse(tuple(size * unit for size in sizes), tuple(size if are_heads else inner for size in sizes))


def _parts(trace: Trace, number: int, dim: int) -> list[tuple[int, int]]:
    """Size and value of each part that dim ``dim`` of a value is taken apart into, in order; empty when it stays whole."""
    size = trace.values[number].shape[dim]
    for same, where in _followed(trace, number, dim):
        pieces: list[tuple[int, int, int]] = []
        for op in trace.readers.get(same, []):
            pieces += _pieces(trace, op, same, where)
        pieces = sorted(set(pieces))
        if len(pieces) > 1 and sum(length for _, length, _ in pieces) == size:
            return [(length, part) for _, length, part in pieces]
        if pieces and pieces[0][1] == 1 and size > 1:  # one index of several: every index is a part
            return [(1, pieces[0][2])] * size
    return []


def _pieces(trace: Trace, op: Op, number: int, dim: int) -> list[tuple[int, int, int]]:
    """(start, length, value) of what one op takes out of dim ``dim``; empty when it does not cut that dim."""
    before = trace.values[number].shape
    shapes = [trace.values[out].shape for out in op.outputs]
    if op.name in SPLITS and len(shapes) > 1 and shapes[0][:dim] + shapes[0][dim + 1 :] == before[:dim] + before[dim + 1 :]:
        lengths = [shape[dim] for shape in shapes]
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        return list(zip(starts, lengths, op.outputs, strict=True)) if lengths[0] < before[dim] else []
    if op.name in ("unbind", "__iter__") and len(op.outputs) == before[dim] and dim == _named(op, 1, "dim", 0) % len(before):
        return [(index, 1, out) for index, out in enumerate(op.outputs)]
    if op.name == "select" and dim == _named(op, 1, "dim", 0) % len(before):
        return [(_named(op, 2, "index", 0) % before[dim], 1, op.outputs[0])]
    if op.name == "narrow" and dim == _named(op, 1, "dim", 0) % len(before):
        return [(_named(op, 2, "start", 0), shapes[0][dim], op.outputs[0])]
    entry = index_at(op, dim, len(before)) if op.name == "__getitem__" else None
    if type(entry) is int:
        return [(entry % before[dim], 1, op.outputs[0])]
    if isinstance(entry, slice):
        start, stop, step = entry.indices(before[dim])
        return [(start, stop - start, op.outputs[0])] if step == 1 and stop - start < before[dim] else []
    return []


def index_at(op: Op, dim: int, ndim: int) -> object:
    """What an indexing op says about dim ``dim``; None where it says nothing, or indexes by tensors."""
    index = op.arguments[1] if isinstance(op.arguments[1], tuple) else (op.arguments[1],)
    if "<tensor>" in index:
        return None
    taken = sum(entry is not None and entry is not Ellipsis for entry in index)
    entries: list[object] = []
    for entry in index:
        if entry is Ellipsis:
            entries += [slice(None)] * (ndim - taken)
        elif entry is not None:  # None adds a dim
            entries.append(entry)
    return entries[dim] if dim < len(entries) else None


def _named(op: Op, position: int, name: str, default: int) -> int:
    """An integer argument given by position or by name."""
    found = op.named.get(name, op.arguments[position] if len(op.arguments) > position else default)
    return found if isinstance(found, int) else default


def _order(op: Op) -> tuple[int, ...]:
    """The dims of a ``permute``: one by one, as a tuple or by name."""
    for item in op.arguments:
        if isinstance(item, tuple):
            return item[1] if item[0] == "dims" else item
    return op.arguments[1:]


def _followed(trace: Trace, number: int, dim: int) -> list[tuple[int, int]]:
    """The value and every one made from it alone that keeps dim ``dim`` whole, each with the place of that dim."""
    found, queue = {number: dim}, deque([number])
    while queue:
        current = queue.popleft()
        for op in trace.readers.get(current, []):
            where = _place_after(trace, op, current, found[current])
            if where is not None and op.outputs[0] not in found:
                found[op.outputs[0]] = where
                queue.append(op.outputs[0])
    return list(found.items())


def _place_after(trace: Trace, op: Op, number: int, dim: int) -> int | None:
    """Where an op on one value alone leaves dim ``dim``; None where it does something else to it."""
    if op.layer is not None or len(op.outputs) != 1 or len(op.inputs) != 1 or not trace.is_inside_block(op):
        return None
    before, after = trace.values[number].shape, trace.values[op.outputs[0]].shape
    if op.name == "permute":
        return [d % len(before) for d in _order(op)].index(dim)
    if op.name in ("transpose", "swapaxes"):
        a = _named(op, 1, "dim0", _named(op, 1, "axis0", 0)) % len(before)
        b = _named(op, 2, "dim1", _named(op, 2, "axis1", 0)) % len(before)
        return b if dim == a else a if dim == b else dim
    is_last = dim == len(before) - 1
    if is_last and op.name in _VIEWS and len(_trailing(trace, op, before[-1])) > 1:
        return None  # as one head, of which halves are no fused parts
    if is_last and after and after[-1] == before[-1] and op.name not in ("__getitem__", "select"):
        return len(after) - 1  # such as flattening [B, T, d] to [B * T, d]
    return dim if op.name in _KEEPS_DIMS or (before == after and op.name != "attribute") else None


def _heads(trace: Trace, part: int) -> int:
    view = _first_view(trace, part)
    return 0 if view is None else _trailing(trace, view, trace.values[part].shape[-1])[0]


def _first_view(trace: Trace, output: int) -> Op | None:
    """The first op that views the last dim as several dims."""
    shape = trace.values[output].shape
    for number, dim in _followed(trace, output, len(shape) - 1):
        for op in trace.readers.get(number, []) if dim == len(trace.values[number].shape) - 1 else ():
            if op.name in _VIEWS and len(_trailing(trace, op, shape[-1])) > 1:
                return op
    return None


def _trailing(trace: Trace, view: Op, size: int) -> tuple[int, ...]:
    """The last dims of a view's result whose product is ``size``."""
    shape, lead = trace.values[view.outputs[0]].shape, trace.values[view.inputs[0]].shape[:-1]
    if shape[: len(lead)] == lead and prod(shape[len(lead) :]) == size:
        return shape[len(lead) :]  # a dim of 1 before them may be a sequence of one token
    product = 1
    for count, dim in enumerate(reversed(shape), start=1):
        product *= dim
        if product == size and (count == len(shape) or shape[-count - 1] != 1):
            return shape[len(shape) - count :]
    return (size,)
