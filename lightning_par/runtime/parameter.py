"""The record that every installed parameter carries: what it is a piece of.

Parameters stay plain local ``nn.Parameter`` shards, because DeepSpeed flattens them. The gradient norm, the sums of
tied and partial gradients and the checkpoint read this record and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

_ATTRIBUTE = "lightning_par_spec"


@dataclass(frozen=True)
class Split:
    """How a tensor is cut over the tp axis: along ``dim``, every segment on its own, in equal parts.

    A fused query-key-value weight of 3d rows has segments ``(d, d, d)``: each tp coordinate holds its part of all three.
    A segment that does not divide is padded with zeros at its end: 7 rows over 2 ranks are 4 and 3 + one of zeros.
    With fewer key heads than ranks, neighbouring ranks hold copies of one part::

        coordinate     0   1   2   3
        copies 1       0   1   2   3        parts of a segment
        copies 2       0   0   1   1
        copies 4       0   0   0   0        the whole segment everywhere

    Attributes:
        dim: the tensor dim that is cut.
        segments: sizes along ``dim``, in order; one segment for a plain cut. Their sum is the global size.
        copies: ranks in a row that hold the same part, for each segment; empty where every rank has parts of its own.
    """

    dim: int
    segments: tuple[int, ...]
    copies: tuple[int, ...] = ()

    def local_segments(self, size: int) -> tuple[int, ...]:
        """Sizes of the segments on one of ``size`` ranks, padding included."""
        return tuple(-(-segment * copies // size) for segment, copies in self._each())

    def local_shape(self, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        """The shape on one of ``size`` ranks of a tensor of the global ``shape``."""
        return (*shape[: self.dim], sum(self.local_segments(size)), *shape[self.dim + 1 :])

    def divides(self, size: int) -> bool:
        """Whether every segment has an equal part for each of ``size`` ranks, without padding."""
        return all(segment * copies % size == 0 for segment, copies in self._each())

    def shard(self, tensor: torch.Tensor, size: int, coordinate: int, *, is_total: bool = False) -> torch.Tensor:
        """The part of a global tensor at one tp coordinate, as a contiguous copy.

        Args:
            tensor: the global tensor.
            size, coordinate: of the axis of the ranks.
            is_total: whether the tensor is a whole gradient, of which each copy takes its share.
        """
        pieces = []
        for piece, local, (_, copies) in self._pieces(tensor, size):
            start = min(coordinate // copies * local, piece.shape[self.dim])
            part = piece.narrow(self.dim, start, min(local, piece.shape[self.dim] - start))
            pieces.append(_padded(part / copies if is_total and copies > 1 else part, self.dim, local))
        return torch.cat(pieces, self.dim).contiguous()

    def parts(self, size: int, coordinate: int) -> list[tuple[int, int, int]]:
        """What of a global tensor lies at one coordinate: for each segment where it begins along the dim, how many entries it
        has, and where it goes in the shard. Entries of the shard that are in none are padding."""
        found, start, local_start = [], 0, 0
        for (segment, copies), local in zip(self._each(), self.local_segments(size), strict=True):
            first = min(coordinate // copies * local, segment)
            found.append((start + first, min(local, segment - first), local_start))
            start, local_start = start + segment, local_start + local
        return found

    def shards(self, tensor: torch.Tensor, size: int) -> torch.Tensor:
        """The parts of a global tensor at all tp coordinates, contiguous ``[size, ...]``."""
        if len(self.segments) == 1 and self.divides(size) and not self.copies:
            return tensor.unflatten(self.dim, (size, -1)).movedim(self.dim, 0).contiguous()
        return torch.stack([self.shard(tensor, size, coordinate) for coordinate in range(size)])

    def unshard(self, shards: Sequence[torch.Tensor], *, is_total: bool = True) -> torch.Tensor:
        """The global tensor from the shards of all tp coordinates, in order. Inverse of `shard`.

        Args:
            shards: by coordinate of the axis of the ranks.
            is_total: whether every copy holds the part itself; if not, it holds one addend, as gradients of copies do.
        """
        by_rank = [shard.split(self.local_segments(len(shards)), self.dim) for shard in shards]
        pieces: list[torch.Tensor] = []
        for index, (segment, copies) in enumerate(self._each()):
            parts = [rank[index] for rank in by_rank]
            if copies > 1:
                groups = [parts[first : first + copies] for first in range(0, len(parts), copies)]
                parts = [group[0] if is_total else torch.stack(group).sum(0) for group in groups]
            pieces += parts if segment % len(parts) == 0 else [torch.cat(parts, self.dim).narrow(self.dim, 0, segment)]
        return torch.cat(pieces, self.dim)

    def _pieces(self, tensor: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, int, tuple[int, int]]]:
        """Each segment of a global tensor, with its local size and its own size and copies."""
        return zip(tensor.split(self.segments, self.dim), self.local_segments(size), self._each(), strict=True)

    def _each(self) -> Iterator[tuple[int, int]]:
        return zip(self.segments, self.copies or (1,) * len(self.segments), strict=True)


def _padded(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """``tensor`` with zeros after it, so that dim ``dim`` has ``size`` entries."""
    missing = size - tensor.shape[dim]
    if missing == 0:
        return tensor
    return torch.cat([tensor, tensor.new_zeros((*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :]))], dim)


@dataclass(frozen=True)
class ParameterSpec:
    """What a local parameter is a piece of.

    Attributes:
        name: the user's own name of it, the same on every stage.
        shape: the global shape.
        split: how it is cut over tp; ``None`` where every tp rank holds all of it.
        stages: pp coordinates of the ranks that hold it, ascending; more than one for tied weights.
        partial: its gradient on one tp rank covers only that rank's part of the activations and must be summed over tp.
    """

    name: str
    shape: tuple[int, ...]
    split: Split | None = None
    stages: tuple[int, ...] = (0,)
    partial: bool = False


def set_spec(parameter: nn.Parameter, spec: ParameterSpec) -> None:
    """Put the record on a parameter. DeepSpeed keeps Parameter objects, so it stays through ZeRO-3."""
    setattr(parameter, _ATTRIBUTE, spec)


def has_spec(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a piece that `install` made."""
    return hasattr(parameter, _ATTRIBUTE)


def get_spec(parameter: nn.Parameter) -> ParameterSpec:
    """The record of an installed parameter. Raises AttributeError for a parameter that `install` never saw."""
    spec: ParameterSpec = getattr(parameter, _ATTRIBUTE)
    return spec
