"""Lightning comes under two names whose classes are disjoint: which one a script uses, and a class made for it."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import FrameType, ModuleType
from typing import Any

ROOTS = ("pytorch_lightning", "lightning.pytorch")


@lru_cache
def bind(mixin: Any, root: str, base_name: str = "strategies.ParallelStrategy") -> Any:
    """``mixin`` as a strategy, or a subclass of another of Lightning's classes, of one namespace; its ``root`` says which."""
    module, _, name = base_name.rpartition(".")
    base = getattr(import_module(f"{root}.{module}"), name)
    return type(mixin.__name__, (mixin, base), {"root": root, "__module__": mixin.__module__, "__doc__": mixin.__doc__})


def root_in_use(caller: FrameType | None) -> str:
    """The namespace that is imported; where both are, the one that the calling script names; else the one installed.

    Args:
        caller: frame of the call; the frames below it are looked at too.
    """
    loaded = [root for root in ROOTS if root in sys.modules]
    if len(loaded) == 1:
        return loaded[0]
    if not loaded:
        return next(root for root in ROOTS if find_spec(root.partition(".")[0]) is not None)
    while caller is not None:
        for value in list(caller.f_globals.values()):
            root = _root_of(value)
            if root is not None:
                return root
        caller = caller.f_back
    return loaded[0]


def worker_seeding(root: str) -> Any:
    """What seeds the workers of a loader, given a rank."""
    return import_module(f"{_fabric(root)}.utilities.seed").pl_worker_init_function


def environments(root: str) -> Any:
    """The module with Lightning's environments, such as ``SLURMEnvironment``."""
    return import_module(f"{_fabric(root)}.plugins.environments")


def _fabric(root: str) -> str:
    """The lower of Lightning's packages, of one namespace."""
    return "lightning.fabric" if root.startswith("lightning.") else "lightning_fabric"


def _root_of(value: object) -> str | None:
    """The namespace that a global of a script comes from."""
    name = str(value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", ""))
    if name == "pytorch_lightning" or name.startswith("pytorch_lightning."):
        return "pytorch_lightning"
    return "lightning.pytorch" if name == "lightning" or name.startswith("lightning.") else None
