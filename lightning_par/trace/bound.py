"""Parameters that something besides the forward holds on to, so that they must stay the tensors that they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lightning_par.private.torch import has_gradient_hook, place_of


def bound_parameters(module: nn.Module) -> dict[str, str]:
    """Names of the parameters with a hook on their gradient, or whose memory a plain attribute or a buffer shares; and which."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    bound = {names[id(p)]: "a hook on it sees its gradient" for p in module.parameters() if has_gradient_hook(p)}
    for path, _, parameter in views_of_parameters(module):
        bound.setdefault(names[id(parameter)], f"{path.rsplit('.', 1)[-1]} shares its memory")
    return bound


def views_of_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, nn.Parameter]]:
    """Plain attributes and buffers that share the memory of a parameter: the path, the tensor, the parameter."""
    owners = {place[0]: parameter for parameter in module.parameters() if (place := place_of(parameter)) is not None}
    for path, child in module.named_modules():
        for key, value in {**vars(child), **child._buffers}.items():
            place = place_of(value) if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter) else None
            if place is not None and place[0] in owners:
                yield f"{path}.{key}".lstrip("."), value, owners[place[0]]
