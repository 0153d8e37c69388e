"""Walking through nested containers of tensors: batches, arguments and outputs of modules."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch


def tensors_in(nested: Any) -> list[torch.Tensor]:
    """The tensors of nested mappings, sequences and dataclasses, in order."""
    if isinstance(nested, torch.Tensor):
        return [nested]
    if isinstance(nested, Mapping):
        return [tensor for value in nested.values() for tensor in tensors_in(value)]
    if isinstance(nested, (tuple, list)):
        return [tensor for value in nested for tensor in tensors_in(value)]
    if dataclasses.is_dataclass(nested) and not isinstance(nested, type):
        return [tensor for field in dataclasses.fields(nested) for tensor in tensors_in(getattr(nested, field.name))]
    return []


def map_tensors(function: Callable[[torch.Tensor], Any], nested: Any) -> Any:
    """The same nesting with every tensor replaced by ``function(tensor)``; containers keep their type."""
    if isinstance(nested, torch.Tensor):
        return function(nested)
    if isinstance(nested, MutableMapping):  # a copy keeps the class of BatchEncoding, ModelOutput, defaultdict
        twin = copy.copy(nested)
        for key, value in nested.items():
            twin[key] = map_tensors(function, value)
        return twin
    if isinstance(nested, tuple) and hasattr(nested, "_fields"):
        return type(nested)(*(map_tensors(function, value) for value in nested))
    if isinstance(nested, (tuple, list)):
        return type(nested)(map_tensors(function, value) for value in nested)
    if dataclasses.is_dataclass(nested) and not isinstance(nested, type):
        changes = {field.name: map_tensors(function, getattr(nested, field.name)) for field in dataclasses.fields(nested)}
        twin = copy.copy(nested)
        for name, value in changes.items():
            object.__setattr__(twin, name, value)
        return twin
    return nested
