"""Sums of shared gradients, the one global norm, and clipping.

The norm counts every element of the global model once (`ParameterSpec` says what a parameter is a piece of), in one
all-reduce over the world: no rank may wait for another that has fewer parameter groups.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.parameter import ParameterSpec, get_spec
from lightning_par.zero.bucket import sum_gradients
from lightning_par.zero.states import OptimizerStates


def sum_shared_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Sum, in place, the gradients that several ranks of one replica hold parts of. Before `OptimizerStates.reduce`.

    A weight tied over stages is summed over them, a partial gradient over tp. A rank without a gradient counts as zero.
    Collective over tp and over the tied stages, whose axes must exist: ``mesh.tied`` was called by all ranks before.

    Args:
        parameters: of this rank; those that need no gradient are left out.
        mesh: the mesh of the run.
    """
    trainable = sorted((p for p in parameters if p.requires_grad), key=lambda p: get_spec(p).name)
    partial = [p for p in trainable if get_spec(p).partial]
    sum_gradients(partial, _local_shapes(partial, mesh), mesh.tp)
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
    for fragment, parameter, is_counted in states.gradients(optimizer):
        if is_counted and _is_counted_once(get_spec(parameter), mesh):
            total += torch.linalg.vector_norm(fragment, dtype=torch.float64).square()
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
    for fragment, _, _ in states.gradients(optimizer):
        fragment.mul_(factor.to(fragment.device))


@torch.no_grad()
def clip_by_value(states: OptimizerStates, value: float, optimizer: Optimizer | None = None) -> None:
    """Clamp every gradient element to ``[-value, value]``. Elements are whole after the sums, so no rank asks another."""
    for fragment, _, _ in states.gradients(optimizer):
        fragment.clamp_(-value, value)


def _is_counted_once(spec: ParameterSpec, mesh: Mesh) -> bool:
    """Whether this rank counts the parameter among its replica's tp x pp ranks: shards all, copies the first only."""
    is_first_tp = spec.split is not None or mesh.coordinate.tp == 0
    return is_first_tp and mesh.coordinate.pp == spec.stages[0]


def _local_shapes(parameters: Iterable[nn.Parameter], mesh: Mesh) -> list[tuple[int, ...]]:
    """Shapes of the shards on this rank, from the record: under ZeRO-3 the parameter itself is empty at that time."""
    return [
        spec.shape if spec.split is None else spec.split.local_shape(spec.shape, mesh.tp.size) for spec in map(get_spec, parameters)
    ]
