"""The record that every installed parameter carries: what it is a piece of.

Parameters stay plain local ``nn.Parameter`` shards, because DeepSpeed flattens them. The gradient norm, the sums of
tied and partial gradients and the checkpoint read this record and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

_ATTRIBUTE = "lightning_par_spec"


@dataclass(frozen=True)
class Split:
    """How a tensor is cut over the tp axis: along ``dim``, every segment on its own, in equal parts.

    A fused query-key-value weight of 3d rows has segments ``(d, d, d)``: each tp coordinate holds its part of all three.

    Attributes:
        dim: the tensor dim that is cut.
        segments: sizes along ``dim``, in order; one segment for a plain cut. Their sum is the global size.
    """

    dim: int
    segments: tuple[int, ...]

    def local_segments(self, size: int) -> tuple[int, ...]:
        """Sizes of the segments on one of ``size`` ranks."""
        return tuple(segment // size for segment in self.segments)

    def divides(self, size: int) -> bool:
        """Whether every segment has an equal part for each of ``size`` ranks."""
        return all(segment % size == 0 for segment in self.segments)

    def shard(self, tensor: torch.Tensor, size: int, coordinate: int) -> torch.Tensor:
        """The part of a global tensor at one tp coordinate, as a contiguous copy."""
        pieces = [segment.chunk(size, self.dim)[coordinate] for segment in tensor.split(self.segments, self.dim)]
        return torch.cat(pieces, self.dim).contiguous()

    def unshard(self, shards: list[torch.Tensor]) -> torch.Tensor:
        """The global tensor from the shards of all tp coordinates, in order. Inverse of `shard`."""
        local = self.local_segments(len(shards))
        by_rank = [shard.split(local, self.dim) for shard in shards]
        return torch.cat([pieces[i] for i in range(len(local)) for pieces in by_rank], self.dim)


@dataclass(frozen=True)
class ParameterSpec:
    """What a local parameter is a piece of.

    Attributes:
        name: the user's own name of it, the same on every stage.
        shape: the global shape.
        split: how it is cut over tp; ``None`` where every tp rank holds all of it.
        stages: pipeline stages that hold it, ascending; more than one for tied weights.
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
