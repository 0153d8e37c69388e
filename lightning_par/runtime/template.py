"""What a block returned, as plain data: enough to build the same kind of object again around other tensors.

A template is a constant (None, a bool, a number, a string), or a triple for a container::

    (type, keys, children)     ("tuple", (0, 1), (None, 3))
                               ("tests.models:Output", ("hidden", "weights"), (None, None))

Tensors, and objects that are neither containers nor constants, stand as None. Containers are those of
`lightning_par.runtime.nested`. A *path* is the keys that lead to a leaf, ``()`` for the whole.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch

from lightning_par.runtime.nested import children

Path: TypeAlias = tuple[int | str, ...]
Template: TypeAlias = Any

_BUILTIN: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict}


def describe(tree: Any) -> Template:
    """The template of a tree."""
    pairs = children(tree)
    if pairs is None:
        return tree if tree is None or type(tree) in (bool, int, float, str) else None
    return _name(type(tree)), tuple(key for key, _ in pairs), tuple(describe(child) for _, child in pairs)


def fill(template: Template, leaves: Mapping[Path, Any]) -> Any:
    """A tree like the described one, with ``leaves`` at their paths.

    Raises:
        ImportError, AttributeError: a type of the template is not there by its name.
    """
    return _fill(template, leaves, ())


def _fill(template: Template, leaves: Mapping[Path, Any], path: Path) -> Any:
    if path in leaves:
        return leaves[path]
    if not isinstance(template, tuple):
        return template
    name, keys, inner = template
    return _build(find_type(name), keys, [_fill(child, leaves, (*path, key)) for key, child in zip(keys, inner, strict=True)])


def types_in(template: Template) -> Iterator[str]:
    """The names of the types of a template's containers, outermost first."""
    if isinstance(template, tuple):
        yield template[0]
        for child in template[2]:
            yield from types_in(child)


def find_type(name: str) -> type:
    """The type of that name; raises as `fill`."""
    if name in _BUILTIN:
        return _BUILTIN[name]
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    kind: type = found
    return kind


def tensors_by_path(tree: Any, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """Every tensor in a tree with its path, in order."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    for key, child in children(tree) or ():
        yield from tensors_by_path(child, (*path, key))


def leaf_at(tree: Any, path: Path) -> Any:
    """What lies at a path.

    Raises:
        KeyError: nothing does.
    """
    for key in path:
        tree = dict(children(tree) or ())[key]
    return tree


def arguments_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
    """The arguments of a call as one tree, by position and keyword."""
    return dict[int | str, Any](enumerate(args)) | dict(kwargs)


def _name(kind: type) -> str:
    return kind.__name__ if _BUILTIN.get(kind.__name__) is kind else f"{kind.__module__}:{kind.__qualname__}"


def _build(kind: type, keys: tuple[Any, ...], values: list[Any]) -> Any:
    """A container of a type; the code of a dataclass around its own construction does not run."""
    if issubclass(kind, Mapping):
        if dataclasses.is_dataclass(kind):
            return kind(**dict(zip(keys, values, strict=True)))  # such as a ModelOutput, which is both
        made: Any = kind()
        made.update(zip(keys, values, strict=True))
        return made
    if dataclasses.is_dataclass(kind):
        made = object.__new__(kind)
        for key, value in zip(keys, values, strict=True):
            object.__setattr__(made, key, value)  # frozen ones too
        return made
    build: Any = kind
    return build(*values) if hasattr(kind, "_fields") else build(values)
