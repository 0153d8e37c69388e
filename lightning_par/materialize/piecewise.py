"""A part of a tensor alone, where every operation that made it works element by element: pieces of 2^18 elements at a time.

Torch draws ``normal_`` in groups of 16 elements from as many numbers, and ``uniform_`` from one number for each element: the
elements from any multiple of 16 on can be drawn without those before.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lightning_par.materialize.record import Operation, Place, Record, map_places, places_in
from lightning_par.materialize.replay import FILLS, call_of, fill_fast, is_truncation, passes_of, state_before
from lightning_par.materialize.stream import CELL, GROUP, Stream, offset_words, piece_end
from lightning_par.materialize.truncation import fill_truncated
from lightning_par.runtime.generator import generators_put_back

Range = tuple[int, int]
Streams = dict[int, list[Stream]]  # by operation
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_SHAPED = {"zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1, "zeros": 0, "ones": 1}
_COPIES = {"clone", "_to_copy", "copy_", "detach"}


def piecewise(record: Record, place: Place) -> list[Operation] | None:
    """The operations that make a tensor, if all of them work element by element; else None."""
    operations = record.needed([place.key])
    if not operations or not _is_whole(record, place, place.numel):
        return None
    return operations if all(_works(record, operation, place) for operation in operations) else None


def fill_pieces(
    record: Record, operations: Sequence[Operation], place: Place, ranges: Sequence[Range]
) -> Iterator[tuple[int, torch.Tensor]]:
    """The elements of a tensor in some flat ranges, ascending: where a piece begins, and its elements. Not to be kept.

    Memory: a few pieces.
    """
    streams: Streams = {}
    buffers: dict[int, torch.Tensor] = {}  # the same memory for all pieces
    with generators_put_back(), torch.no_grad():
        for first, last in ranges:
            start = _start(first, place.numel)
            while start < last:
                end = piece_end(start, last, place.numel)
                piece = _piece(record, operations, place.key, (start, end), streams, buffers)
                low, high = max(start, first), min(end, last)
                yield low, piece[low - start : high - start]
                start = end


def _start(first: int, numel: int) -> int:
    """Where the first piece begins: at a multiple of 16, and not within the last 16 elements."""
    start = first // GROUP * GROUP
    return max(start - GROUP, 0) if numel - start < GROUP else start


def _piece(
    record: Record, operations: Sequence[Operation], key: int, span: Range, streams: Streams, buffers: dict[int, torch.Tensor]
) -> torch.Tensor:
    start, end = span
    held: dict[int, torch.Tensor] = {}

    def at(place: Place) -> torch.Tensor:
        if place.key not in held:
            if place.key not in buffers:
                buffers[place.key] = _buffer(place.dtype)
            held[place.key] = buffers[place.key][: end - start]
        return held[place.key]

    for operation in operations:
        name, target = operation.name, operation.target
        if operation.draw is not None:
            _draw(record, operation, at(target), start, streams)
        elif name in _SHAPED:
            at(target).fill_(_SHAPED[name])
        elif name == "full":
            at(target).fill_(operation.args[1])
        elif name in ("fill_", "zero_"):
            low, high = max(target.offset, start), min(target.offset + target.numel, end)
            if low < high:
                value = operation.args[1] if name == "fill_" else 0
                at(target)[low - start : high - start].fill_(value)
        elif name == "copy_":
            at(target).copy_(at(operation.args[1]))
        elif name in ("clone", "_to_copy", "detach"):
            source = operation.args[0]
            flat = at(source) if isinstance(source, Place) else source.view(-1)[start:end]
            held[target.key] = flat.to(target.dtype, copy=True)
        elif name not in _EMPTY:
            result = operation.function(*map_places(at, operation.args), **map_places(at, operation.kwargs))
            if operation.target.key not in held:
                held[operation.target.key] = result
    return held[key]


def _buffer(dtype: torch.dtype) -> torch.Tensor:
    """Memory for a piece, from the system: in malloc's heap it leaves a hole of its size behind for each parameter."""
    return torch.frombuffer(mmap.mmap(-1, (CELL + GROUP) * dtype.itemsize), dtype=dtype)


def _draw(record: Record, operation: Operation, out: torch.Tensor, start: int, streams: Streams) -> None:
    """Draw the elements from ``start`` on."""
    if record.init == "fast":
        fill_fast(record, operation, out, start)
        return
    if operation.index not in streams:
        streams[operation.index] = _streams(record, operation)
    if is_truncation(operation):
        fill_truncated(out, start, call_of(operation)[1], streams[operation.index])
    else:
        streams[operation.index][0].fill(out, start)


def _streams(record: Record, operation: Operation) -> list[Stream]:
    """What an operation draws, for a truncated draw that of each pass."""
    (name, args), draw = call_of(operation), operation.draw
    assert draw is not None
    if is_truncation(operation):
        return passes_of(record, operation).streams(args, draw.generator)
    return [Stream(state_before(record, draw), name, args, draw.generator)]


def _works(record: Record, operation: Operation, place: Place) -> bool:
    """Whether an operation computes every element of its result from the same elements of its inputs."""
    name, target = operation.name, operation.target
    if name in ("fill_", "zero_") and not places_in(operation.args[1:]) and _is_number(operation.args[1:]):
        return target.is_contiguous and _is_whole_storage(record, target, place.numel)
    everything: list[Place] = [*places_in(operation.args), *places_in(operation.kwargs), *operation.outputs]
    if not all(_is_whole(record, each, place.numel) for each in everything):
        return False
    if operation.draw is not None:
        return _draws(record, operation, target)
    known = {*_EMPTY, *_SHAPED, *_COPIES}
    if name in known:
        source: Any = operation.args[1] if name == "copy_" else next(iter(operation.args), None)
        return (
            isinstance(source, Place)
            or name not in _COPIES
            or (name == "clone" and source.numel() == place.numel and source.is_contiguous())
        )
    if name == "full":
        return _is_number(operation.args[1:2])
    is_pointwise = torch.Tag.pointwise in getattr(operation.function, "tags", ())
    constants = [each for each in operation.args if isinstance(each, torch.Tensor)]
    return is_pointwise and all(each.numel() == 1 for each in constants)


def _draws(record: Record, operation: Operation, target: Place) -> bool:
    name, args = call_of(operation)
    if name not in FILLS or record.init == "fast" or is_truncation(operation):
        return name in FILLS
    return target.numel >= GROUP and offset_words(name, args, target.dtype, GROUP) is not None


def _is_number(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (bool, int, float)) for value in values)


def _is_whole(record: Record, place: Place, numel: int) -> bool:
    return place.is_contiguous and place.offset == 0 and place.numel == numel and _is_whole_storage(record, place, numel)


def _is_whole_storage(record: Record, place: Place, numel: int) -> bool:
    return record.storages[place.key].nbytes() == numel * place.dtype.itemsize
