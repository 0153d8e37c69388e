"""Ghosts: what a cut that does not divide leaves at the end of a part, and what keeps them out of every result.

Seven entries over two ranks are four, and three and a ghost (`runtime.parameter.Split` pads with zeros). Functions of
single elements compute on ghosts too, so a ghost may hold anything, infinities included:

    along the cut dim   parts are read `without_ghosts`, or ghosts are `filled` with what changes nothing
    gradients           `shielded`: that of a ghost is zero, so that no weight and no replicated tensor gets any of it
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from lightning_par.runtime.axis import Axis, finest_axis
from lightning_par.runtime.parameter import Split
from lightning_par.tensor.copies import cut_over


@functools.lru_cache(maxsize=4096)  # asked for every sharded tensor that is made
def local_size(segments: tuple[int, ...], axis: Axis) -> int:
    """Entries in every part of a dim that is cut into ``segments``, ghosts included."""
    return sum(cut_over(axis, 0, segments).local_segments(finest_axis(axis).size))


@functools.lru_cache(maxsize=4096)
def has_ghosts(segments: tuple[int, ...], axis: Axis) -> bool:
    """Whether some rank of the axis holds ghosts of a dim that is cut into ``segments``."""
    return not cut_over(axis, 0, segments).divides(finest_axis(axis).size)


def num_real(segment: int, axis: Axis) -> int:
    """Entries of one segment that this rank holds, ghosts left out."""
    size = _size(segment, axis)
    return max(0, min(size, segment - axis.coordinate * size))


def without_ghosts(local: torch.Tensor, cut: Split, axis: Axis) -> torch.Tensor:
    """The entries of a part that are no ghosts: ``cut.dim`` shrinks to them, on some ranks to 0."""
    if not has_ghosts(cut.segments, axis):
        return local
    if len(cut.segments) == 1:
        return local.narrow(cut.dim, 0, num_real(cut.segments[0], axis))
    offset, kept = 0, []
    for segment in cut.segments:
        kept.append(torch.arange(offset, offset + num_real(segment, axis), device=local.device))
        offset += _size(segment, axis)
    return local.index_select(cut.dim, torch.cat(kept))


def filled(local: torch.Tensor, cut: Split, axis: Axis, value: float) -> torch.Tensor:
    """A part whose ghosts are ``value``."""
    mask = _ghosts(cut.segments, axis, local.device)
    return local if mask is None else local.masked_fill(_along(mask, cut.dim, local.dim()), value)


def shielded(local: torch.Tensor, cut: Split, axis: Axis) -> torch.Tensor:
    """A part itself; the gradient of its ghosts is zero."""
    if not (torch.is_grad_enabled() and local.requires_grad):
        return local
    mask = _ghosts(cut.segments, axis, local.device)
    return local if mask is None else _Shield.apply(local, _along(mask, cut.dim, local.dim()))


def _ghosts(segments: tuple[int, ...], axis: Axis, device: torch.device) -> torch.Tensor | None:
    """A mask over the cut dim of this rank's part, true for ghosts; None where it has none."""
    if not has_ghosts(segments, axis):
        return None
    counts = [(_size(segment, axis), num_real(segment, axis)) for segment in segments]
    if all(size == count for size, count in counts):
        return None
    return torch.cat([torch.arange(size, device=device) >= count for size, count in counts])


def _size(segment: int, axis: Axis) -> int:
    """Entries of one segment in every part, ghosts included."""
    return -(-segment // axis.size)


def _along(mask: torch.Tensor, dim: int, ndim: int) -> torch.Tensor:
    return mask.view(-1, *(1,) * (ndim - dim - 1))


class _Shield(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.mask = mask
        return local.detach()  # not a view: a view would keep its base alive

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.masked_fill(ctx.mask, 0), None
