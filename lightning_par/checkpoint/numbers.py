"""What optimizers keep for a parameter as a whole, such as a step count, or in a form that no box describes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_par.errors import CheckpointError
from lightning_par.runtime.axis import Axis
from lightning_par.runtime.parameter import ParameterSpec, get_spec

_ALIKE = {"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"}  # what one keeps, the others read


def name_numbers(numbers: Iterable[tuple[nn.Parameter, Mapping[str, Any]]], tp: Axis) -> dict[str, dict[str, Any]]:
    """By name of the parameter, and by name of the number; one that belongs to a tp rank's part says so behind an ``@``.

    Tensors are on the CPU. Scalars that are equal are one tensor, which is pickled once.

    Args:
        numbers: what `lightning_par.zero.states.OptimizerStates.numbers` gives.
        tp: this rank's axis.
    """
    named: dict[str, dict[str, Any]] = {}
    scalars: dict[tuple[torch.dtype, float], Tensor] = {}
    for parameter, values in numbers:
        spec = get_spec(parameter)
        for key, value in values.items():
            where = ""
            if isinstance(value, Tensor):
                value = value.cpu()
                if value.dim() == 0:
                    value = scalars.setdefault((value.dtype, value.item()), value)
                elif value.numel() > 1:
                    where = _whose(spec, tp)
            named.setdefault(spec.name, {})[f"{key}@{where}" if where else key] = value
    return named


def numbers_here(named: Mapping[str, Mapping[str, Any]], spec: ParameterSpec, tp: Axis) -> dict[str, Any]:
    """The numbers of one parameter, of those that `name_numbers` gave on all ranks.

    Raises:
        CheckpointError: another tp wrote what belongs to parts.
    """
    found, parts = {}, {}
    for key, value in named.get(spec.name, {}).items():
        name, _, where = key.partition("@")
        if not where or where == _whose(spec, tp):
            found[name] = value
        else:
            parts[name] = where
    lost = parts.keys() - found.keys()
    if lost:
        name = min(lost)
        raise CheckpointError(
            f"{name} of {spec.name} is not one number for each element, and the checkpoint has it for {parts[name]}: resume with "
            "the tp that it was trained with"
        )
    return found


def member_names(optimizers: Iterable[Optimizer]) -> list[list[list[str]]]:
    """The parameters of this rank in each group of each optimizer, in their order there."""
    return [[[get_spec(p).name for p in group["params"]] for group in each.param_groups] for each in optimizers]


def merge_members(every: Sequence[list[list[list[str]]]], names: Iterable[str]) -> list[list[list[str]]]:
    """Of what `member_names` gave on all ranks: the groups as one process has them.

    Args:
        every: by rank. A rank has the parameters of its stages.
        names: of all parameters, in the order of the module, in which several stages are put together.
    """
    order = {name: place for place, name in enumerate(names)}
    merged = []
    for optimizer in zip(*every, strict=True):
        groups = [list(dict.fromkeys(name for group in groups for name in group)) for groups in zip(*optimizer, strict=True)]
        is_whole = all(len(group) == len(first) for group, first in zip(groups, optimizer[0], strict=True))
        merged.append(groups if is_whole else [sorted(group, key=order.__getitem__) for group in groups])
    return merged


def check_optimizers(saved: Sequence[str] | None, optimizers: Sequence[Optimizer]) -> None:
    """Check that states fit the optimizers; ``saved`` are names of classes, None where there are no states.

    Raises:
        CheckpointError: they are of other classes.
    """
    there = [name.rpartition(".")[2] for name in saved or ()]
    here = [type(each).__name__ for each in optimizers]
    if saved is not None and there != here and not _ALIKE.issuperset((*there, *here)):
        raise CheckpointError(
            f"the checkpoint has states of {', '.join(there)}, and configure_optimizers gives {', '.join(here)}: resume with the "
            "optimizer that it was trained with, or load its weights alone"
        )


def _whose(spec: ParameterSpec, tp: Axis) -> str:
    return "" if spec.split is None or tp.size == 1 else f"tp {tp.coordinate} of {tp.size}"
