"""Changing the class of a module in place, under the user's own class.

    user's module   class Scaled(nn.Embedding): forward = super().forward(ids) * scale
    converted       Scaled -> VocabularyParallelEmbedding -> nn.Embedding

so that a forward which calls ``super().forward`` keeps what it adds, and parameters, hooks and identity stay.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from lightning_par.errors import ModelError

_RECORD = "lightning_par_layer"


class ParallelLayer(nn.Module):
    """Base of the layers that a module is converted to; ``record`` says how this one is cut."""

    @property
    def record(self) -> Any:
        """The frozen record that `convert` put on the module."""
        return self.__dict__[_RECORD]

    def extra_repr(self) -> str:
        return ", ".join(part for part in (super().extra_repr(), self.record.describe(self)) if part)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)  # transformers' Conv1D has one that shows less


def convert(module: nn.Module, base: type[nn.Module], layer: type[ParallelLayer], record: Any) -> None:
    """Turn ``module``, an instance of ``base`` or of a class derived from it, into a ``layer``.

    Raises:
        ModelError: the class of the module has a forward that never calls the one of ``base``.
    """
    user = type(module)
    owner = next(cls for cls in user.__mro__ if "forward" in vars(cls))
    if owner is not base and not _calls_super(vars(owner)["forward"]):
        raise ModelError(
            f"{user.__name__}.forward replaces {base.__name__}.forward, so it cannot be split over tp: "
            f"call super().forward(...) in it, or leave this layer whole in the plan"
        )
    set_record(module, record)
    classes: tuple[Any, ...] = (user, base, layer)
    module.__class__ = _derive(*classes)


def set_record(module: nn.Module, record: Any) -> None:
    """Say how a converted layer is cut."""
    module.__dict__[_RECORD] = record


@functools.cache
def _derive(user: type[nn.Module], base: type[nn.Module], layer: type[ParallelLayer]) -> type[nn.Module]:
    between = type(layer.__name__, (layer, base), {"__module__": layer.__module__})
    return between if user is base else type(user.__name__, (user, between), {"__module__": user.__module__})


def _calls_super(forward: Any) -> bool:
    code = getattr(forward, "__code__", None)
    return code is not None and "forward" in code.co_names and ("__class__" in code.co_freevars or "super" in code.co_names)
