"""Fused outputs and heads of a column layer, read off what the code does with its output."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from lightning_par.trace import Layer, Op, Trace

_SPLITS = {"split", "chunk", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"}
_TAKES_APART = _SPLITS | {"unbind", "__getitem__", "select", "__iter__"}


@dataclass(frozen=True)
class OutputUse:
    """What the code does with the last dim of a column layer's output.

    Attributes:
        segments: sizes of the fused parts; one part when nothing is fused.
        heads: heads that each part is viewed as; 0 where it is not viewed as heads.
    """

    segments: tuple[int, ...]
    heads: tuple[int, ...]


def output_use(trace: Trace, layer: Layer, output: int) -> OutputUse:
    """Follow the output of a layer to where its last dim is split or viewed.

    Three ways to write a fused projection are known: ``split``, ``chunk`` or slices of the last dim; a view as
    ``(..., parts, heads, size)`` whose ``parts`` are taken apart later; and ``(..., heads, parts * size)``, which needs no
    segments because heads come first.
    """
    readers = _readers(trace)
    parts = _split_parts(trace, readers, output, layer.out_size)
    if parts is not None:
        sizes = tuple(trace.values[number].shape[-1] for number in parts)
        return OutputUse(sizes, tuple(_heads(trace, readers, number) for number in parts))
    view = _first_view(trace, readers, output)
    if view is None:
        return OutputUse((layer.out_size,), (0,))
    trailing = _trailing(trace, view, layer.out_size)
    if len(trailing) >= 3 and _is_taken_apart(trace, readers, view.outputs[0], len(trace.values[view.outputs[0]].shape) - len(trailing)):
        return OutputUse((layer.out_size // trailing[0],) * trailing[0], (trailing[1],) * trailing[0])
    return OutputUse((layer.out_size,), (trailing[0],))


def _readers(trace: Trace) -> dict[int, list[Op]]:
    readers: dict[int, list[Op]] = {}
    for op in trace.ops:
        for number in set(op.inputs):
            readers.setdefault(number, []).append(op)
    return readers


def _split_parts(trace: Trace, readers: dict[int, list[Op]], output: int, size: int) -> list[int] | None:
    """The values that the last dim is split into, in order; None when it is not split."""
    for number in _same_last_dim(trace, readers, output):
        slices: list[tuple[int, int]] = []
        for op in readers.get(number, []):
            sizes = [trace.values[out].shape[-1] for out in op.outputs if trace.values[out].shape]
            if op.name in _SPLITS and len(sizes) > 1 and sum(sizes) == size and _same_leading(trace, number, op.outputs[0]):
                return list(op.outputs)
            if op.name == "__getitem__" and len(op.outputs) == 1 and sizes and sizes[0] < size and _same_leading(trace, number, op.outputs[0]):
                slices.append((_slice_start(op), op.outputs[0]))
        if slices and sum(trace.values[out].shape[-1] for _, out in slices) == size:
            return [out for _, out in sorted(slices)]
    return None


def _same_last_dim(trace: Trace, readers: dict[int, list[Op]], output: int) -> list[int]:
    """The output and every value made from it alone that keeps its last dim whole."""
    size = trace.values[output].shape[-1]
    found, queue = [output], deque([output])
    while queue:
        for op in readers.get(queue.popleft(), []):
            if op.layer is None and len(op.outputs) == 1 and trace.is_inside_block(op.phase):
                shape = trace.values[op.outputs[0]].shape
                if shape and shape[-1] == size and op.outputs[0] not in found and len(op.inputs) == 1:
                    found.append(op.outputs[0])
                    queue.append(op.outputs[0])
    return found


def _heads(trace: Trace, readers: dict[int, list[Op]], part: int) -> int:
    view = _first_view(trace, readers, part)
    return 0 if view is None else _trailing(trace, view, trace.values[part].shape[-1])[0]


def _first_view(trace: Trace, readers: dict[int, list[Op]], output: int) -> Op | None:
    """The first op that views the last dim as several dims."""
    size = trace.values[output].shape[-1]
    for number in _same_last_dim(trace, readers, output):
        for op in readers.get(number, []):
            if op.name in ("view", "reshape", "unflatten") and len(_trailing(trace, op, size)) > 1:
                return op
    return None


def _trailing(trace: Trace, view: Op, size: int) -> tuple[int, ...]:
    """The last dims of a view's result whose product is ``size``."""
    shape = trace.values[view.outputs[0]].shape
    product = 1
    for count, dim in enumerate(reversed(shape), start=1):
        product *= dim
        if product == size and (count == len(shape) or shape[-count - 1] != 1):
            return shape[len(shape) - count :]
    return (size,)


def _is_taken_apart(trace: Trace, readers: dict[int, list[Op]], number: int, dim: int) -> bool:
    """Whether some later op splits, indexes or unbinds dim ``dim`` of a value, followed through permutations."""
    for op in readers.get(number, []):
        where = _moved(op, dim, len(trace.values[number].shape))
        if op.name in _TAKES_APART:
            before, after = trace.values[number].shape, trace.values[op.outputs[0]].shape
            if len(after) < len(before) or after[dim] < before[dim]:
                return True
        elif where is not None and len(op.outputs) == 1 and _is_taken_apart(trace, readers, op.outputs[0], where):
            return True
    return False


def _moved(op: Op, dim: int, ndim: int) -> int | None:
    """Where a permuting op puts dim ``dim``; None for any other op."""
    if op.name == "permute":
        order = op.arguments[1] if isinstance(op.arguments[1], tuple) else op.arguments[1:]
        return [d % ndim for d in order].index(dim)
    if op.name in ("transpose", "swapaxes"):
        a, b = op.arguments[1] % ndim, op.arguments[2] % ndim
        return b if dim == a else a if dim == b else dim
    return dim if op.name in ("contiguous", "clone", "to", "float", "half", "bfloat16") else None


def _same_leading(trace: Trace, before: int, after: int) -> bool:
    return trace.values[before].shape[:-1] == trace.values[after].shape[:-1]


def _slice_start(op: Op) -> int:
    index = op.arguments[1] if isinstance(op.arguments[1], tuple) else (op.arguments[1],)
    last = index[-1]
    return (last.start or 0) if isinstance(last, slice) else 0
