"""How much an optimizer keeps, read off what it really keeps: a step of the user's own class on tiny parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_par.runtime.nested import tensors_in

_SHAPES = (2, 3), (5, 7)  # two, so that what grows with the elements is told from what does not


@dataclass(frozen=True)
class GroupForm:
    """What is kept of the parameters of one group.

    Attributes:
        names: of the parameters, as the user's module has them first.
        element_bytes: for each element: Adam's two moments in fp32 are 8, momentum is 4.
        tensor_bytes: for each tensor besides, such as its number of steps.
    """

    names: frozenset[str]
    element_bytes: int
    tensor_bytes: int


@dataclass(frozen=True)
class OptimizerForm:
    """What is kept of all parameters, by group, in the user's order; groups without a trainable parameter are left out."""

    groups: tuple[GroupForm, ...]


def read_optimizer(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> OptimizerForm | None:
    """The form of an optimizer's states; the optimizer and its parameters are not changed.

    Args:
        optimizer: the user's, over the whole module.
        parameters: of the module, by their first names.

    Returns:
        None where it is not elements and tensors that count (Adafactor), or where a step needs more than gradients (LBFGS).
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = []
    for group in optimizer.param_groups:
        trainable = frozenset(names[id(p)] for p in group["params"] if p.requires_grad and id(p) in names)
        if not trainable:
            continue
        try:
            small, large = (_kept_bytes(optimizer, group, shape) for shape in _SHAPES)
        except Exception:  # an optimizer of the user's may ask for anything
            return None
        sizes = [torch.Size(shape).numel() for shape in _SHAPES]
        element_bytes, rest = divmod(large - small, sizes[1] - sizes[0])
        if rest or small < element_bytes * sizes[0]:
            return None
        groups.append(GroupForm(trainable, element_bytes, small - element_bytes * sizes[0]))
    return OptimizerForm(tuple(groups))


def _kept_bytes(optimizer: Optimizer, group: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    """Bytes of the state of one parameter of ``shape`` after a step of an optimizer of the same class and settings."""
    like = group["params"][0]
    parameter = nn.Parameter(torch.zeros(shape, dtype=like.dtype))
    parameter.grad = torch.zeros_like(parameter)
    twin: Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})  # a scheduler binds it
    twin.param_groups, twin.state = [{**group, "params": [parameter]}], defaultdict(dict)
    twin.step()
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_in(dict(twin.state[parameter])))
