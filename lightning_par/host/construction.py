"""Building the user's module: without memory for weights, or where its constructor cannot run so, whole.

``init`` says how its weights come about:

- ``exact``: each rank makes its shards alone, with the numbers that one process draws.
- ``fast``: the same, from a seed for each weight.
- ``constructor``: every rank runs the constructor as it is, one rank of a host at a time, and cuts its shards out.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_par.errors import ConfigurationError, ModelError
from lightning_par.materialize import defer_values, deferred_init, is_deferred, seeing_deferred, shares_record
from lightning_par.private.torch import has_gradient_hook
from lightning_par.runtime.generator import generators_put_back_on_error
from lightning_par.trace.bound import views_of_parameters

INIT_WORDS = ("exact", "fast", "constructor")
_LARGE = 1 << 20  # bytes from which on a weight is put into a file


def check_init_word(init: str) -> str:
    """Raises ConfigurationError for a word that says no way of making weights."""
    if init not in INIT_WORDS:
        raise ConfigurationError(f"init={init}: there is no such way of making weights; there are {', '.join(INIT_WORDS)}")
    return init


def construct(build: Callable[[], Any], init: str) -> Any:
    """What ``build`` returns, its weights deferred where that works.

    Raises:
        ConfigurationError: ``init`` is unknown.
        Exception: what the constructor raises on real tensors.
    """
    if check_init_word(init) != "constructor":
        try:
            with generators_put_back_on_error(), deferred_init(init):
                return build()
        except Exception as error:
            failure = error
        module = _construct_whole(build)
        _say(type(module).__name__, failure)
        return module
    return _construct_whole(build)


@contextmanager
def configuring(module: nn.Module, init: str) -> Iterator[None]:
    """Around a ``configure_model``: what it builds is deferred. Where that fails it is called again here, on real tensors."""
    if init == "constructor":
        with _turn():
            yield
            _move_to_files(module)
        return
    held: list[dict[str, Any]] = [module._modules, module._parameters, module._buffers]
    before = [dict(each) for each in held]
    try:
        with generators_put_back_on_error(), deferred_init(init):
            yield
    except Exception as error:
        for each, old in zip(held, before, strict=True):
            each.clear()
            each.update(old)
        _construct_whole(partial(_configure, module))
        _say(f"{type(module).__name__}.configure_model", error)


@contextmanager
def weights_untouched(module: nn.Module) -> Iterator[None]:
    """Around the module's ``setup``, in which weights that have no memory yet can neither be read nor changed.

    Raises:
        ModelError: it tries.
    """

    def refuse(tensor: torch.Tensor, operation: str) -> None:
        names = [name for name, each in (*module.named_parameters(), *module.named_buffers()) if shares_record(each, tensor)]
        raise ModelError(
            f"{type(module).__name__}.setup calls {operation} on {names[0] if names else 'a weight'}, and weights get their memory "
            "after it: do it in the constructor or in configure_model, or use init=constructor"
        )

    with seeing_deferred(refuse):
        yield


def guard_setup(module: Any) -> None:
    """Let `weights_untouched` hold for the call of ``setup`` that the Trainer makes."""
    setup = module.setup

    def guarded(stage: str) -> None:
        with weights_untouched(module):
            setup(stage)

    if any(is_deferred(tensor) for tensor in module.parameters()):
        module.__dict__["setup"] = guarded


def _configure(module: Any) -> Any:
    module.configure_model()
    return module


def _say(what: str, error: Exception) -> None:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    rank_zero_warn(
        f"{what} cannot run without memory for its weights ({reason}): every rank builds it whole, one rank of a host at a time, "
        f"with its weights in files under {tempfile.gettempdir()}; init=constructor says so without trying"
    )


def _construct_whole(build: Callable[[], Any]) -> Any:
    with _turn():
        module = build()
        if isinstance(module, nn.Module):
            _move_to_files(module)
    return module


@contextmanager
def _turn() -> Iterator[None]:
    """Inside, no other rank of this host and user is here."""
    with open(Path(tempfile.gettempdir()) / f"lightning_par_{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _move_to_files(module: nn.Module) -> None:
    """Defer large weights: their values go to files mapped into memory, whose pages the system can take back.

    The files have no name, and end with the process.
    """
    seen = {parameter for _, _, parameter in views_of_parameters(module)}
    values: dict[torch.Tensor, torch.Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        size = tensor.untyped_storage().nbytes()
        is_alone = tensor.is_contiguous() and size == tensor.numel() * tensor.itemsize and tensor not in seen
        is_hooked = isinstance(tensor, nn.Parameter) and has_gradient_hook(tensor)
        if tensor.device.type == "cpu" and size >= _LARGE and is_alone and not is_hooked:
            with tempfile.NamedTemporaryFile() as file:
                file.truncate(size)
                values[tensor] = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
            values[tensor].copy_(tensor.detach())
    defer_values(values)
