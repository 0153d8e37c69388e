"""Arithmetic of cut dims: where a cut dim goes in a view, and which segments a slice holds. No tensors.

A dim cut into ``segments`` over ``parts`` ranks gives each rank an equal share of every segment, rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_par.tensor.registry import NoRule

_MAX_SEGMENTS = 4096  # flattening [B, T, V] cut along V gives B * T segments; beyond this a gather is cheaper


def resolve_shape(shape: Sequence[int], numel: int) -> tuple[int, ...]:
    """``shape`` with its -1 replaced. A shape that does not fit is left to torch's own message."""
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and known > 0 and numel % known == 0:
        return tuple(numel // known if size == -1 else size for size in shape)
    if known != numel or -1 in shape:
        raise NoRule
    return tuple(shape)


def view_cut(
    shape: Sequence[int], dim: int, segments: tuple[int, ...], new_shape: Sequence[int], parts: int
) -> tuple[int, tuple[int, ...]]:
    """Where the cut goes when ``shape``, cut along ``dim``, is viewed as ``new_shape`` (same product).

    Dims are grouped from the left so that the products of a group are equal on both sides:

        [B, T, 3d] -> [B, T, 3, H, D]     groups  B|B  T|T  3d|3,H,D        segments (d, d, d): cut at H
        [B, T, H, D] -> [B, T, H * D]     groups  B|B  T|T  H,D|H*D         segments (H,): cut at H*D

    Returns:
        The cut dim of the view and its segments.
    """
    i = j = 0
    while i < len(shape):
        start_i, start_j = i, j
        old, i = shape[i], i + 1
        new = 1
        while old != new or (start_i == dim and start_j == j):  # a cut dim of size 1 takes a dim with it
            if new <= old and j < len(new_shape):
                new, j = new * new_shape[j], j + 1
            elif old < new and i < len(shape):
                old, i = old * shape[i], i + 1
            else:
                raise NoRule
        if start_i <= dim < i:
            inner = math.prod(shape[dim + 1 : i])
            repeats = math.prod(shape[start_i:dim])
            if repeats * len(segments) > _MAX_SEGMENTS:
                raise NoRule
            flat = tuple((segment * inner, -(-segment // parts) * inner) for segment in segments) * repeats
            offset, cut = _place(flat, new_shape[start_j:], parts)
            return start_j + offset, cut
    raise NoRule


def _place(flat: tuple[tuple[int, int], ...], sizes: Sequence[int], parts: int) -> tuple[int, tuple[int, ...]]:
    """The dim of ``sizes`` that the cut of a flat range falls on, and the segments along it.

    Either whole rows of the first dim belong to one rank, or all rows are cut alike (one period of ``flat`` each).

    Args:
        flat: for each segment of the range, its global and its local size.
        sizes: of the dims that the range is viewed as.
        parts: ranks.
    """
    if not sizes:
        raise NoRule
    row = sum(segment for segment, _ in flat) // sizes[0]
    if all(segment % row == 0 and -(-segment // row // parts) * row == local for segment, local in flat):
        return 0, tuple(segment // row for segment, _ in flat)
    period = len(flat) // sizes[0]
    if len(flat) % sizes[0] or flat != flat[:period] * sizes[0]:
        raise NoRule
    dim, segments = _place(flat[:period], sizes[1:], parts)
    return dim + 1, segments


def take_segments(segments: tuple[int, ...], start: int, stop: int) -> slice:
    """Which segments lie between two positions along the dim, which must be ends of segments."""
    position, taken = 0, []
    for index, segment in enumerate(segments):
        if start <= position and position + segment <= stop:
            taken.append(index)
        elif position < stop and start < position + segment:
            raise NoRule  # part of a segment
        position += segment
    if not taken:
        raise NoRule
    return slice(taken[0], taken[-1] + 1)
