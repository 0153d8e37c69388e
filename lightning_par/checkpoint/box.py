"""Boxes: parts of a tensor that are a range along every dim, and how a rank's piece of a shard is made of them.

A rank holds flat ranges of shards of global tensors. In a checkpoint only the global tensor is spoken of, so that any layout
reads what any other wrote::

    global tensor [6, 4]        shard of tp 1 (rows 3 to 5)      its flat range 2..9 on one dp rank
    . . . .                     . . . .                          boxes, by offset and shape in the global tensor:
    . . . .                     . . . .                          (3, 2) + (1, 2)     . . x x
    . . . .                                                      (4, 0) + (1, 4)     x x x x
    x x x x                                                      (5, 0) + (1, 1)     x . . .
    x x x x
    x x x x
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from lightning_par.runtime.parameter import Split


class Box(NamedTuple):
    """A range along every dim.

    Attributes:
        offset: where it begins.
        shape: how far it reaches.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def __and__(self, other: Box) -> Box | None:
        """What two boxes of one tensor share; None where that is nothing."""
        offset = tuple(map(max, self.offset, other.offset))
        ends = (min(a + n, b + m) for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True))
        shape = tuple(end - start for start, end in zip(offset, ends, strict=True))
        return Box(offset, shape) if all(size > 0 for size in shape) else None

    def of(self, tensor: Tensor) -> Tensor:
        """The box of a tensor, as a view."""
        return tensor[tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))]

    def inside(self, other: Box) -> Box:
        """The same box, counted from where ``other`` begins."""
        return Box(tuple(a - b for a, b in zip(self.offset, other.offset, strict=True)), self.shape)


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """A flat range of a contiguous tensor as boxes, in its order: at most 2 * dims - 1, each contiguous in the range.

    Args:
        shape: of the tensor.
        start, stop: the range of its elements.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # the rows that are whole
    if first > last:  # the range lies inside one row
        yield from _in_row(last, shape, start - last * inner, stop - last * inner)
        return
    if start < first * inner:
        yield from _in_row(first - 1, shape, start - (first - 1) * inner, inner)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if last * inner < stop:
        yield from _in_row(last, shape, 0, stop - last * inner)


def _in_row(row: int, shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    for offset, size in flat_boxes(shape[1:], start, stop):
        yield Box((row, *offset), (1, *size))


class Place(NamedTuple):
    """A box of a global tensor in a rank's piece of it.

    Attributes:
        box: in the global tensor.
        start: where the range begins, in the piece read flat, in which the box lies.
        shape: of that range, which is contiguous.
        part: the box in it.
    """

    box: Box
    start: int
    shape: tuple[int, ...]
    part: Box

    def of(self, piece: Tensor) -> Tensor:
        """The box of a flat piece, as a view ``[*box.shape]``."""
        return self.part.of(piece.narrow(0, self.start, math.prod(self.shape)).view(self.shape))


def places(
    shape: tuple[int, ...], split: Split | None, size: int, coordinate: int, start: int, stop: int, *, is_writer: bool = False
) -> Iterator[Place]:
    """The boxes of a global tensor in a flat range of one rank's shard of it. Padding of the shard is in none.

    Args:
        shape: of the global tensor.
        split: how it is cut; None where the shard is all of it.
        size, coordinate: of the axis over which it is cut.
        start, stop: the range of the shard's elements.
        is_writer: leave out what another coordinate has too and is the first to have.
    """
    split = None if size == 1 else split
    local_shape = shape if split is None else split.local_shape(shape, size)
    done = start
    for local in flat_boxes(local_shape, start, stop):
        begin, done = done - start, done + local.numel
        if split is None:
            yield Place(local, begin, local.shape, local.inside(local))
            continue
        copies = split.copies or (1,) * len(split.segments)
        for (first, count, place), same in zip(split.parts(size, coordinate), copies, strict=True):
            segment = Box(
                (*(0 for _ in shape[: split.dim]), place, *(0 for _ in shape[split.dim + 1 :])),
                (*local_shape[: split.dim], count, *local_shape[split.dim + 1 :]),
            )
            shared = local & segment
            if shared is not None and not (is_writer and coordinate % same):
                moved = shared.offset[split.dim] - place + first
                yield Place(
                    Box((*shared.offset[: split.dim], moved, *shared.offset[split.dim + 1 :]), shared.shape),
                    begin,
                    local.shape,
                    shared.inside(local),
                )
