"""Copies of a module for a dry run: the module's own Python state copied, its tensors replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_par.private.torch import call_as_written
from lightning_par.trace.bound import views_of_parameters


def copy_module(module: nn.Module, replace: Callable[[torch.Tensor], torch.Tensor], by_reference: Iterable[Any] = ()) -> nn.Module:
    """A copy of ``module`` whose parameters and buffers are ``replace(tensor)``; ties stay ties, views of parameters views.

    Nothing that the dry run does to the copy (counters, lists, metric states) reaches the user's module. Data sets and
    loaders, which may be large, are shared, and so is an attribute that cannot be copied.

    Args:
        module: what to copy.
        replace: gives the copy's tensor; called once for each distinct parameter or buffer.
        by_reference: objects that the copy shares with the original (the trainer).
    """
    memo: dict[int, Any] = {id(shared): shared for shared in by_reference if shared is not None}
    for tensor in (*module.parameters(), *module.buffers()):
        memo[id(tensor)] = replace(tensor)
    for _, view, parameter in views_of_parameters(module):
        offset = view.storage_offset() - parameter.storage_offset()
        memo[id(view)] = memo[id(parameter)].detach().as_strided(view.shape, view.stride(), offset)
    return _copy(module, memo)


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(module) in memo:
        known: nn.Module = memo[id(module)]
        return known
    twin = module.__class__.__new__(module.__class__)
    memo[id(module)] = twin
    state: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        if name == "_modules":
            state[name] = {key: None if child is None else _copy(child, memo) for key, child in value.items()}
        elif name in ("_parameters", "_buffers"):
            state[name] = {key: None if tensor is None else memo[id(tensor)] for key, tensor in value.items()}
        else:
            state[name] = _copy_attribute(value, memo)
    twin.__dict__.update(state)  # past __setattr__, which would register things a second time
    call_as_written(twin)
    return twin


def _copy_attribute(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, nn.Module):
        return _copy(value, memo)
    if isinstance(value, (Dataset, DataLoader)):
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # open files, locks, non-leaf tensors: whatever cannot be copied is shared
        return value
