"""A loader beside the user's, of the same class and with the same attributes, that does more."""

from __future__ import annotations

from functools import cache
from typing import Any


def twin_of(loader: Any, mixin: type[Any]) -> Any:
    """An object of the loader's class with ``mixin`` before it.

    Its attributes are those of the loader, in one dict: persistent workers, and whatever Lightning sets on either. What it has
    of its own is in the slots of ``mixin``.
    """
    twin = object.__new__(_class_of(mixin, type(loader)))  # type: ignore[arg-type]  # a class has a hash
    twin.__dict__ = loader.__dict__
    return twin


@cache
def _class_of(mixin: Any, cls: Any) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (mixin, cls), names)
