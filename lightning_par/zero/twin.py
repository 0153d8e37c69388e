"""A second optimizer that steps something else in the user's place: masters, or flat partitions of them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch.optim import Optimizer


def twin_of(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """An optimizer of the same class and settings over other groups, without states.

    ``copy.copy`` would drop attributes of the user's subclass, and keep the ``step`` that a learning-rate scheduler bound to
    the original. Where the class frees something in the end, as DeepSpeedCPUAdam does with its C++ object, only the original
    does: it must outlive the twin.
    """
    cls: Any = type(optimizer)
    if hasattr(cls, "__del__"):
        cls = type(cls.__name__, (cls,), {"__del__": lambda self: None})
    twin: Optimizer = object.__new__(cls)
    twin.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
    twin.param_groups, twin.state = groups, defaultdict(dict)
    return twin


def hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """All of a parameter group but its parameters."""
    return {key: value for key, value in group.items() if key != "params"}
