"""Layers, parameters and arguments of a module in motion, as plain data."""

from __future__ import annotations

from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_par.trace.record import LayerKind, ParameterInfo


def layer_kind(module: nn.Module) -> LayerKind | None:
    """What kind of splittable layer a module is, or None; one with other parameters than a weight and a bias is none."""
    if module._parameters.get("weight") is None or module._parameters.keys() - {"weight", "bias"}:
        return None  # parametrized, quantized, or with an adapter of its own
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if any(cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__):
        return "conv1d"
    return None


def parameters_of(module: nn.Module) -> dict[str, ParameterInfo]:
    """The parameters of a module by their first names."""
    aliases: dict[int, list[str]] = {}
    tensors = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    return {
        names[0]: ParameterInfo(names[0], tuple(p.shape), p.element_size(), p.requires_grad, tuple(names))
        for key, names in aliases.items()
        for p in (tensors[key],)
    }


def state_of(module: nn.Module) -> dict[int, str]:
    """Paths of the buffers, and of the tensors that are plain attributes of modules, by the id of the tensor."""
    return {
        id(tensor): f"{path}.{key}".lstrip(".")
        for path, child in module.named_modules()
        for key, tensor in {**vars(child), **child._buffers}.items()
        if isinstance(tensor, torch.Tensor)
    }


def plain_arguments(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Arguments of a call as `Op.arguments` has them."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return "<tensor>"
        if isinstance(value, (tuple, list)):
            return tuple(plain(item) for item in value)
        if value is None or isinstance(value, (Number, str, slice, type(Ellipsis))):
            return value
        if isinstance(value, np.ndarray):
            return value.shape, value.tobytes()
        return str(value) if isinstance(value, (torch.dtype, torch.device, torch.memory_format)) else type(value).__name__

    return tuple(plain(a) for a in args) + tuple((key, plain(value)) for key, value in sorted(kwargs.items()))
