"""Sums of shared gradients, the one global norm, and clipping.

The norm counts every element of the global model once (`ParameterSpec` says what a parameter is a piece of), in one
all-reduce over the world: no rank may wait for another that has fewer parameter groups. Where ranks hold copies of one
part, each counts it for its share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_par.runtime.axis import Axis
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.parameter import ParameterSpec, get_spec
from lightning_par.zero.bucket import sum_gradients
from lightning_par.zero.states import Fragment, OptimizerStates


def sum_shared_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Sum, in place, the gradients that several ranks of one replica hold parts of. Before `OptimizerStates.reduce`.

    A weight tied over stages is summed over them, a partial gradient over tp, one of copies over the ranks that hold them. A
    rank without a gradient counts as zero. Collective over tp and over the tied stages; the axes of stages and of copies must
    exist: ``mesh.tied`` and ``mesh.copies`` were called by all ranks before.

    Args:
        parameters: of this rank; those that need no gradient are left out.
        mesh: the mesh of the run.
    """
    trainable = sorted((p for p in parameters if p.requires_grad), key=lambda p: get_spec(p).name)
    partial = [p for p in trainable if get_spec(p).partial]
    sum_gradients(partial, _local_shapes(partial, mesh), mesh.tp)
    for count in sorted({count for p in trainable if (split := get_spec(p).split) for count in split.copies if count > 1}):
        segments = [segment for p in trainable for segment in _copied_segments(p, count, mesh)]
        _sum_segments(segments, mesh.copies(count))
    for stages in sorted({get_spec(p).stages for p in trainable if len(get_spec(p).stages) > 1}):
        tied = [p for p in trainable if get_spec(p).stages == stages]
        sum_gradients(tied, _local_shapes(tied, mesh), mesh.tied(stages))


@torch.no_grad()
def global_norm(states: OptimizerStates, mesh: Mesh, optimizer: Optimizer | None = None) -> Tensor:
    """The 2-norm of the gradient of the whole model, the same on every rank. Collective over the world.

    Call it after ``states.reduce()``. Squares are summed in float64; an infinite or undefined gradient stays so.

    Args:
        states: whose gradients.
        mesh: the mesh of the run.
        optimizer: only the parameters of this one.

    Returns:
        A 0-dim float32 tensor on the device of the parameters.
    """
    total = torch.zeros((), dtype=torch.float64, device=next(states.module.parameters()).device)
    for fragment in states.gradients(optimizer):
        if fragment.is_counted and _is_counted_once(get_spec(fragment.parameter), mesh):
            total += _sum_of_squares(fragment, mesh.tp.size)
    mesh.world.all_reduce(total)
    return total.sqrt().float()


@torch.no_grad()
def clip_by_norm(states: OptimizerStates, max_norm: float, norm: Tensor, optimizer: Optimizer | None = None) -> None:
    """Scale the gradients so that their `global_norm` is at most ``max_norm``.

    The formula is that of ``torch.nn.utils.clip_grad_norm_``: times ``min(1, max_norm / (norm + 1e-6))``.

    Args:
        states: whose gradients.
        max_norm: greatest norm left alone.
        norm: what `global_norm` returned for the same gradients; taken, not computed, because it costs a collective.
        optimizer: only the parameters of this one.
    """
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for fragment in states.gradients(optimizer):
        fragment.gradient.mul_(factor.to(fragment.gradient.device))


@torch.no_grad()
def clip_by_value(states: OptimizerStates, value: float, optimizer: Optimizer | None = None) -> None:
    """Clamp every gradient element to ``[-value, value]``. Elements are whole after the sums, so no rank asks another."""
    for fragment in states.gradients(optimizer):
        fragment.gradient.clamp_(-value, value)


def _is_counted_once(spec: ParameterSpec, mesh: Mesh) -> bool:
    """Whether this rank counts the parameter among its replica's tp x pp ranks: shards all, whole ones the first only."""
    is_first_tp = spec.split is not None or mesh.coordinate.tp == 0
    return is_first_tp and mesh.coordinate.pp == spec.stages[0]


def _sum_of_squares(fragment: Fragment, size: int) -> Tensor:
    """Of one of ``size`` tp ranks, in float64. Of copies, each counts an equal share."""
    spec, gradient = get_spec(fragment.parameter), fragment.gradient
    copies = set() if spec.split is None else set(spec.split.copies)
    if spec.split is None or len(copies) < 2:
        return torch.linalg.vector_norm(gradient, dtype=torch.float64).square() / max(copies, default=1)
    shape, dim = spec.split.local_shape(spec.shape, size), spec.split.dim
    sizes = spec.split.local_segments(size)
    shares = [gradient.new_full((n,), 1 / count, dtype=torch.float64) for n, count in zip(sizes, spec.split.copies, strict=True)]
    flat = torch.cat(shares).view(-1, *(1,) * (len(shape) - dim - 1)).expand(shape).reshape(-1)[fragment.start :]
    squares = gradient.reshape(-1).double().square()
    length = min(len(squares), len(flat))  # what is longer than the parameter ends in padding
    return squares[:length] @ flat[:length]


def _copied_segments(parameter: nn.Parameter, count: int, mesh: Mesh) -> list[Tensor]:
    """The segments of a parameter's gradient of which ``count`` ranks hold copies, as views.

    A gradient that is missing here is missing on the other ranks too: they run the same code on the same batch.
    """
    split = get_spec(parameter).split
    if split is None or parameter.grad is None:
        return []
    segments = parameter.grad.split(split.local_segments(mesh.tp.size), split.dim)
    given = zip(segments, split.copies, strict=False)  # none are given where there are none
    return [segment for segment, copies in given if copies == count]


def _sum_segments(segments: Sequence[Tensor], axis: Axis) -> None:
    """Replace the values of tensors by their sums over an axis. Collective over it."""
    stand_ins = [nn.Parameter(segment, requires_grad=False) for segment in segments]
    for stand_in, segment in zip(stand_ins, segments, strict=True):
        stand_in.grad = segment
    sum_gradients(stand_ins, [tuple(segment.shape) for segment in segments], axis)
    for stand_in, segment in zip(stand_ins, segments, strict=True):
        assert stand_in.grad is not None
        segment.copy_(stand_in.grad)


def _local_shapes(parameters: Iterable[nn.Parameter], mesh: Mesh) -> list[tuple[int, ...]]:
    """Shapes of the shards on this rank, from the record: under ZeRO-3 the parameter itself is empty at that time."""
    return [
        spec.shape if spec.split is None else spec.split.local_shape(spec.shape, mesh.tp.size) for spec in map(get_spec, parameters)
    ]
