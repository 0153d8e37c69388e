"""Nested containers (batches, arguments, outputs) as trees whose leaves are everything that is not a container.

Containers are mappings (a ``UserDict`` such as transformers' ``BatchEncoding`` and a ``ModelOutput`` keep their type),
lists, tuples, namedtuples and dataclasses.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch


def children(node: Any) -> list[tuple[Any, Any]] | None:
    """The (key, child) pairs of a container, in order; ``None`` for a leaf."""
    if isinstance(node, Mapping):
        return list(node.items())
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(field.name, getattr(node, field.name)) for field in dataclasses.fields(node)]
    return None


def rebuild(node: Any, values: list[Any]) -> Any:
    """A container like ``node`` (type, keys, other attributes) that holds ``values``, one for each of its children."""
    if isinstance(node, MutableMapping):
        filled = copy.copy(node)
        for key, value in zip(node, values, strict=True):
            filled[key] = value
        return filled
    if isinstance(node, Mapping):
        kind: Any = type(node)  # as those of transformers, it takes a dict, which `Mapping` does not ask for
        return kind(dict(zip(node, values, strict=True)))
    if is_namedtuple(node):
        return type(node)(*values)
    if isinstance(node, (list, tuple)):
        return type(node)(values)
    filled = copy.copy(node)
    for field, value in zip(dataclasses.fields(node), values, strict=True):
        object.__setattr__(filled, field.name, value)  # frozen dataclasses too
    return filled


def arrays_in(node: Any) -> Iterator[torch.Tensor | np.ndarray]:
    """Every tensor and numpy array in the tree, in order."""
    if isinstance(node, (torch.Tensor, np.ndarray)):
        yield node
    for _, child in children(node) or ():
        yield from arrays_in(child)


def tensors_in(node: Any) -> list[torch.Tensor]:
    """Every tensor in the tree, in order."""
    return [array for array in arrays_in(node) if isinstance(array, torch.Tensor)]


def tokens_of(batch: Any) -> int | None:
    """Tokens of a sample: the second dim of the first tensor of whole numbers that has two, [batch, sequence]; None without one."""
    whole = (
        tensor for tensor in tensors_in(batch) if tensor.ndim == 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool
    )
    return next((tensor.shape[1] for tensor in whole), None)


def map_tensors(function: Callable[[torch.Tensor], Any], node: Any) -> Any:
    """The same tree with every tensor replaced by ``function(tensor)``."""
    if isinstance(node, torch.Tensor):
        return function(node)
    pairs = children(node)
    return node if pairs is None else rebuild(node, [map_tensors(function, child) for _, child in pairs])


def path_to(parent: str, node: Any, key: Any) -> str:
    """How a user would write the child at ``key`` of ``node``: ``batch['x'][0].mask``."""
    return f"{parent}[{key!r}]" if isinstance(node, (Mapping, list, tuple)) else f"{parent}.{key}"


def at_path(node: Any, path: str) -> list[Any]:
    """What stands at a dotted path such as ``inputs.mask`` or ``0.labels``, in a list; an empty list where nothing does."""
    for part in path.split("."):
        named = {str(key): child for key, child in children(node) or ()}
        if is_namedtuple(node):
            named.update(zip(type(node)._fields, node, strict=True))
        if part not in named:
            return []
        node = named[part]
    return [node]


def paths_in(node: Any, parent: str = "") -> list[str]:
    """The dotted path of every tensor in the tree, in order, as `at_path` reads it."""
    if isinstance(node, torch.Tensor):
        return [parent] if parent else []
    return [path for key, child in children(node) or () for path in paths_in(child, f"{parent}.{key}" if parent else str(key))]


def is_namedtuple(node: Any) -> bool:
    """Whether ``node`` is a tuple whose places have names, so that its length says nothing about a batch."""
    return isinstance(node, tuple) and hasattr(type(node), "_fields")
