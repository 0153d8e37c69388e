"""The optimizer step inside Lightning: when gradients are reduced and clipped, and who takes the step.

Lightning gives a precision plugin the closure (training_step, backward) and calls its ``clip_gradients`` from
``configure_gradient_clipping``. Its own plugin clips by the norm of one rank's parameters, which is wrong on shards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol

from lightning_par.errors import ConfigurationError


class GradientOwner(Protocol):
    """Who reduces, clips and steps: the strategy. All are collective over the world."""

    def reduce_gradients(self, optimizer: Any) -> None:
        """Average the gradients over all ranks; they are whole when it returns."""

    def clip_gradients(self, optimizer: Any, value: float, algorithm: str) -> None:
        """Clip reduced gradients to a positive ``value``, by ``norm`` or by ``value``."""

    def step_optimizer(self, optimizer: Any) -> None:
        """Update the weights."""


@lru_cache
def precision_class(root: str) -> type[Any]:
    """``HybridPrecision`` for one of Lightning's two names, whose classes are disjoint.

    Args:
        root: ``lightning.pytorch`` or ``pytorch_lightning``.
    """
    base: Any = import_module(f"{root}.plugins.precision").Precision

    class HybridPrecision(base):
        """The optimizer step of a strategy: what `GradientOwner` does, in Lightning's order."""

        def __init__(self, owner: GradientOwner) -> None:
            super().__init__()
            self._owner = owner

        def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any]) -> Any:
            """Run the closure, then ``on_before_optimizer_step`` and clipping on reduced gradients, then the step."""
            result = closure()
            self._owner.reduce_gradients(optimizer)
            self._after_closure(model, optimizer)
            self._owner.step_optimizer(optimizer)
            return result

        def clip_gradients(self, optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: str = "norm") -> None:
            """Clip the gradients of all ranks; a limit of 0 clips nothing."""
            if clip_val > 0:
                self._owner.clip_gradients(optimizer, clip_val, "value" if gradient_clip_algorithm == "value" else "norm")

    return HybridPrecision


def check_precision(plugin: Any) -> None:
    """Check that the plugin that Lightning chose for ``Trainer(precision=..., plugins=...)`` is a plain float32 one.

    Raises:
        ConfigurationError: it is another, or the user's own.
    """
    if plugin.precision != "32-true":
        raise ConfigurationError(
            f"precision={plugin.precision} is not supported yet by HybridParallelStrategy: use precision=32-true"
        )
    origin = type(plugin).__module__
    if origin != __name__ and not origin.endswith(".plugins.precision.precision"):
        raise ConfigurationError(
            f"the precision plugin {type(plugin).__name__} is not supported: HybridParallelStrategy takes the optimizer step; "
            "leave it out of Trainer(plugins=...)"
        )
