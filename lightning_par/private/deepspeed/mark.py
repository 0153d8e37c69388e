"""Attributes put on objects of others: those that DeepSpeed leaves behind, and two that it and schedulers of torch look for."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer


class Marks:
    """The attributes that DeepSpeed puts on modules and parameters.

    It leaves them there. They keep its optimizer alive, and a second engine on the same module would take the parameters
    for partitioned and call the hooks of the first.
    """

    WHILE_RUNNING = ("ds_grads_remaining", "applied_pre_backward_ref_cnt")

    def __init__(self, root: nn.Module) -> None:
        self.names = {marked: set(vars(marked)) for marked in (*root.modules(), *root.parameters())}

    def find(self) -> None:
        """What is new since this object was built."""
        self.names = {marked: vars(marked).keys() - names for marked, names in self.names.items()}

    def remove(self) -> None:
        for marked, names in self.names.items():
            if "_original_parameters" in names:  # stage 3 replaces the dict of a module's parameters
                vars(marked)["_parameters"] = vars(marked)["_original_parameters"]
            for name in (*names, *self.WHILE_RUNNING):
                vars(marked).pop(name, None)


def mark_stepped(optimizer: Optimizer) -> None:
    """Tell learning-rate schedulers that ``optimizer`` stepped, though another object did it for it.

    They warn of a wrong order unless their wrapper of ``optimizer.step`` has set this mark (torch 2.13, lr_scheduler.py).
    """
    optimizer._opt_called = True  # type: ignore[attr-defined]


_parameters_of: WeakKeyDictionary[nn.Module, list[tuple[str, nn.Parameter]]] = WeakKeyDictionary()


def remember_parameters(module: nn.Module) -> None:
    """Have ``module.named_parameters()`` answer from a list: stage 3 asks ten times for each microbatch. `Marks` undo it."""
    _parameters_of[module] = list(module.named_parameters())
    vars(module)["named_parameters"] = MethodType(_named_parameters, module)  # a copy of the module has one of the copy


def _named_parameters(
    module: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    known = _parameters_of.get(module)
    if known is None or (prefix, recurse, remove_duplicate) != ("", True, True):
        return type(module).named_parameters(module, prefix, recurse, remove_duplicate)
    return iter(known)
