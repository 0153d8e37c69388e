"""Attributes put on objects of others: those that DeepSpeed leaves behind, and the one that schedulers of torch look for."""

from __future__ import annotations

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
