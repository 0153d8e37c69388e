"""The table from a torch function to the rule that runs it on sharded tensors.

A rule is called as ``rule(function, args, kwargs)`` with at least one `ShardedTensor` among the arguments and gives what
``function`` would give on the global tensors, sharded or replicated. Where it cannot, it raises `NoRule` before any
side effect, and the call runs on gathered tensors instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

RULES: dict[Callable[..., Any], Rule] = {}


class NoRule(Exception):
    """This call has no sharded form. Never leaves the dispatcher."""


def rule_for(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register the decorated rule for ``functions``."""

    def register(rule: Rule) -> Rule:
        for function in functions:
            RULES[function] = rule
        return rule

    return register


def spellings(names: str) -> list[Callable[..., Any]]:
    """All functions that torch offers under ``names``: ``torch.x``, ``Tensor.x``, ``F.x``, ``torch.special.x``.

    Args:
        names: separated by spaces. One that this torch does not have is left out.
    """
    homes = (torch, torch.Tensor, functional, torch.special)
    return [getattr(home, name) for name in names.split() for home in homes if callable(getattr(home, name, None))]


def getters(names: str) -> list[Callable[..., Any]]:
    """The functions that read the attributes ``names`` (separated by spaces) of a tensor, such as ``x.T``."""
    return [getattr(torch.Tensor, name).__get__ for name in names.split() if hasattr(torch.Tensor, name)]


def setters(names: str) -> list[Callable[..., Any]]:
    """The functions that set the attributes ``names`` (separated by spaces) of a tensor, such as ``x.data = y``."""
    return [getattr(torch.Tensor, name).__set__ for name in names.split()]


def function_name(function: Callable[..., Any]) -> str:
    """The name of a torch function as a user would type it."""
    owner = getattr(function, "__self__", None)
    if function.__name__ in ("__get__", "__set__") and owner is not None:
        return str(owner.__name__)
    return function.__name__
