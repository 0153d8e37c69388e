"""From a tensor without memory to this rank's shard of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from lightning_par.materialize.piecewise import Range, fill_pieces, piecewise
from lightning_par.materialize.record import Place, record_of
from lightning_par.materialize.replay import replay
from lightning_par.runtime.parameter import Split


def materialize_shard(
    tensor: torch.Tensor, split: Split | None, size: int, coordinate: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """This rank's shard of a deferred tensor. Not a collective.

    Memory: the shard and pieces of 1 MiB, where each operation of the tensor's initialisation works element by element; for
    others (an orthogonal matrix) the whole tensor and what it is made from.

    Args:
        tensor: on the meta device, with a record.
        split: how it is cut over ``size`` ranks; None where every rank holds all of it.
        size, coordinate: of the tp axis.
        out: where it is to be, in any dtype; None for new memory.
    """
    record, place = record_of(tensor), Place.of(tensor)
    assert record is not None
    split = None if size == 1 else split
    operations = piecewise(record, place)
    if operations is None:
        whole = replay(record, place)
        shard = whole if split is None else split.shard(whole, size, coordinate)
        return shard if out is None else out.copy_(shard)
    known = operations
    if out is None:
        out = torch.empty(place.shape if split is None else split.local_shape(place.shape, size), dtype=place.dtype)
    gather_parts(out, place.shape, split, size, coordinate, lambda ranges: fill_pieces(record, known, place, ranges))
    return out


def gather_parts(
    out: torch.Tensor,
    shape: tuple[int, ...],
    split: Split | None,
    size: int,
    coordinate: int,
    read: Callable[[list[Range]], Iterator[tuple[int, torch.Tensor]]],
) -> None:
    """Fill a shard from pieces of the global tensor.

    Args:
        out: the shard.
        shape: of the global tensor.
        split, size, coordinate: which shard.
        read: gives the elements in flat ranges, ascending, as pieces: where each begins, and its elements.
    """
    dim = 0 if split is None else split.dim
    inner = math.prod(shape[dim + 1 :])
    parts = [(0, shape[0] if shape else 1, 0)] if split is None else split.parts(size, coordinate)
    columns = [(first * inner, count * inner, local * inner) for first, count, local in parts if count]
    rows, width = math.prod(shape[:dim]), math.prod(shape[dim:])
    ranges = [(0, rows * width)] if rows > 1 else sorted({(first, first + count) for first, count, _ in columns})
    out.zero_()  # of what no rank has: the padding of a vocabulary
    for start, values in read(ranges):
        _put(out.view(rows, -1), width, columns, start, values)


def _put(out: torch.Tensor, width: int, columns: list[tuple[int, int, int]], start: int, values: torch.Tensor) -> None:
    """Put a flat piece of a ``[rows, width]`` tensor where it belongs: the row that it begins in, whole rows, the last one."""
    while values.numel():
        row, column = divmod(start, width)
        if column or values.numel() < width:
            count = min(width - column, values.numel())
            block = values[:count].view(1, -1)
        else:
            count = values.numel() // width * width
            block = values[:count].view(-1, width)
        for first, length, local in columns:
            low, high = max(first, column), min(first + length, column + block.shape[1])
            if low < high:
                target = out[row : row + block.shape[0], local + low - first : local + high - first]
                target.copy_(block[:, low - column : high - column])
        start, values = start + count, values[count:]
