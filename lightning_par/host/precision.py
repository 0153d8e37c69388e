"""Precision and the optimizer step inside Lightning: which precision was chosen; when gradients are reduced, who steps.

``Trainer(precision=...)`` lets Lightning make a plugin, which is read here and replaced by ours. Lightning gives that the closure
(training_step, backward) and calls its ``clip_gradients`` from ``configure_gradient_clipping``. Its own plugins clip by the norm
of one rank's parameters, which is wrong on shards, and skip an overflow on the ranks that see it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol

import torch
from lightning_utilities import apply_to_collection

from lightning_par.errors import ConfigurationError
from lightning_par.host.checkpoints import RunCheckpoints
from lightning_par.host.update import Updates
from lightning_par.loss_scale import LossScale
from lightning_par.runtime.precision import FULL, PRECISIONS, Precision

_LIGHTNINGS = re.compile(
    r"(pytorch_lightning|lightning\.pytorch)\.plugins\.precision\.(precision|amp|half|double|transformer_engine)"
)
_REFUSED = {  # why, and what would work
    "16-true": ("an update that is 5e-4 of a weight is lost in float16, and nothing scales its loss", "16-mixed or bf16-true"),
    "64-true": ("nothing here is tested in float64", "32-true"),
    "transformer-engine": ("its layers are not split", "bf16-mixed or bf16-true"),
    "transformer-engine-float16": ("its layers are not split", "16-mixed"),
}


class StepOwner(Protocol):
    """Whose precision it is: the strategy."""

    @property
    def root_device(self) -> torch.device:
        """Where this rank computes."""

    @property
    def updates(self) -> Updates:
        """Who reduces, clips and steps."""

    @property
    def checkpoints(self) -> RunCheckpoints:
        """Who may be copying what is stepped."""


@lru_cache
def precision_class(root: str) -> type[Any]:
    """``HybridPrecision`` for one of Lightning's two names, whose classes are disjoint.

    Args:
        root: ``lightning.pytorch`` or ``pytorch_lightning``.
    """
    base: Any = import_module(f"{root}.plugins.precision").Precision

    class HybridPrecision(base):
        """The optimizer step of a strategy: what `Updates` does, in Lightning's order."""

        def __init__(self, owner: StepOwner, precision: Precision = FULL) -> None:
            super().__init__()
            self._owner, self._chosen = owner, precision
            self.precision = precision.name  # what trainer.precision says

        def convert_module(self, module: Any) -> Any:
            """Cast parameters and buffers, in place."""
            self._chosen.convert_module(module)
            return module

        def convert_input(self, data: Any) -> Any:
            """Cast the floating-point tensors of a batch."""
            return apply_to_collection(data, torch.Tensor, self._chosen.convert)

        def tensor_init_context(self) -> AbstractContextManager[None]:
            """Around code that makes tensors."""
            return self._chosen.creating()

        def module_init_context(self) -> AbstractContextManager[None]:
            """Around ``configure_model``."""
            return self._chosen.creating()

        @contextmanager
        def forward_context(self) -> Iterator[None]:
            """Around a step; the strategy's own steps are in it already."""
            with self._chosen.computing(self._owner.root_device.type):
                yield

        def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any]) -> Any:
            """Run the closure, then ``on_before_optimizer_step`` and clipping on reduced gradients, then the step."""
            result = closure()
            self._owner.updates.reduce(optimizer)
            self._after_closure(model, optimizer)
            self._owner.checkpoints.settle()
            self._owner.updates.step(optimizer)
            return result

        def clip_gradients(self, optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: str = "norm") -> None:
            """Clip the gradients of all ranks; a limit of 0 clips nothing."""
            if clip_val > 0:
                self._owner.updates.clip(optimizer, clip_val, "value" if gradient_clip_algorithm == "value" else "norm")

    return HybridPrecision


def read_precision(plugin: Any) -> Precision:
    """What the plugin that Lightning made for ``Trainer(precision=..., plugins=...)`` asks for.

    Raises:
        ConfigurationError: something that is not supported, or the plugin is the user's own.
    """
    origin = type(plugin).__module__
    if origin != __name__ and not _LIGHTNINGS.fullmatch(origin):
        raise ConfigurationError(
            f"the precision plugin {type(plugin).__name__} is not supported: HybridParallelStrategy takes the optimizer step; "
            f"leave it out of Trainer(plugins=...), and choose with Trainer(precision=...): {', '.join(PRECISIONS)}"
        )
    if plugin.precision not in PRECISIONS:
        name = str(plugin.precision)
        reason, instead = _REFUSED.get(name, ("it is unknown here", "32-true or bf16-mixed"))
        raise ConfigurationError(f"precision={name} is not supported by HybridParallelStrategy, {reason}: use precision={instead}")
    return PRECISIONS[plugin.precision]


def read_scale(plugin: Any) -> LossScale | None:
    """The loss scale for a plugin that `read_precision` took, with the settings of its scaler; None where it needs none.

    Raises:
        ConfigurationError: the scaler is not enabled.
    """
    if plugin is None or not read_precision(plugin).scales_loss:
        return None
    scaler = getattr(plugin, "scaler", None)
    if scaler is None:  # our own plugin
        return LossScale()
    if not scaler.is_enabled():
        raise ConfigurationError(
            "precision=16-mixed scales the loss, and the scaler of the plugin is not enabled: leave out scaler=..., or give "
            "torch.amp.GradScaler(device, enabled=True) with the device that you train on"
        )
    return LossScale.of(scaler)


def check_device(precision: Precision, device: torch.device) -> None:
    """Check that a device computes in the dtypes of a precision.

    Raises:
        ConfigurationError: a GPU without bfloat16.
    """
    dtype = precision.autocast or precision.parameters
    if dtype is not torch.bfloat16 or device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        return
    major, minor = torch.cuda.get_device_capability(device)
    raise ConfigurationError(
        f"precision={precision.name}: {torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no bfloat16, "
        "which needs 8.0: use precision=16-mixed or precision=32-true"
    )
