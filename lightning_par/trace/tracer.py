"""The dry run itself: one step of the user's module on fake tensors, every torch function recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_par.errors import ModelError
from lightning_par.runtime.nested import map_tensors
from lightning_par.runtime.torch_private import FakeTensorMode, is_data_dependent
from lightning_par.trace.chain import find_chain
from lightning_par.trace.copying import copy_module
from lightning_par.trace.record import Trace
from lightning_par.trace.recorder import Recorder

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def trace_step(
    module: nn.Module,
    batch: Any,
    *,
    batch_size: int,
    step: str = "training_step",
    chain: str | None = None,
    prepare: Callable[[nn.Module], None] | None = None,
    keep_error: bool = False,
) -> Trace:
    """Run one step of a copy of ``module`` on fake tensors and record it. No memory for weights, no side effect.

    A step that fails on fake tensors (its control flow or shapes depend on values) is run on the real ones, on shared weights.

    Args:
        module: the user's LightningModule, untouched.
        batch: one batch as the step gets it.
        batch_size: its number of samples.
        step: the hook to run.
        chain: container of the blocks, when the user's plan names it.
        prepare: called with the copy before it runs, to install parallel layers on it.
        keep_error: when the step raises, give the trace up to there with the error in it.

    Raises:
        ModelError: the step returned None, or cannot be run.
        PlanError: ``chain`` names nothing.
    """
    path, seen = find_chain(module, chain)
    for fake in (True, False):
        recorder, output, error = _run(module, batch, step, path, prepare, fake)
        if error is None or (keep_error and not is_data_dependent(error)):
            break
    if error is not None and not keep_error:
        raise error
    if step == "training_step" and error is None:
        _check_loss(output, type(module).__name__)
    return recorder.finish(step, seen, batch_size, error)


def _run(
    module: nn.Module, batch: Any, step: str, chain: str | None, prepare: Callable[[nn.Module], None] | None, fake: bool
) -> tuple[Recorder, Any, Exception | None]:
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    to_fake = mode.from_tensor if mode is not None else (lambda tensor: tensor)
    training = step == "training_step"
    twin = copy_module(module, to_fake, by_reference=[getattr(module, "_trainer", None)])
    _silence(twin)
    with torch.random.fork_rng(), mode or contextlib.nullcontext():
        if prepare is not None:
            prepare(twin)
        inputs = map_tensors(lambda tensor: to_fake(tensor.detach()), batch)
        recorder = Recorder(twin, chain, inputs)
        twin.train(training)
        output, failure = None, None
        with torch.set_grad_enabled(training), FlopCounterMode(display=False) as flops, recorder.running(flops):
            try:
                output = getattr(twin, step)(inputs, 0)
            except Exception as error:
                failure = error
    return recorder, output, failure


def _check_loss(output: Any, name: str) -> None:
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, torch.Tensor):
        what = "None" if output is None else f"a {type(output).__name__} without a loss tensor"
        raise ModelError(f"{name}.training_step returned {what}: a parallel run needs the loss of every batch; return the loss tensor")


def _silence(twin: nn.Module) -> None:
    """Cut the copy's ways out: metrics and logs of a dry run mean nothing."""
    from torchmetrics import Metric

    twin.__dict__.update(log=_ignore, log_dict=_ignore)
    for child in list(twin.modules()):
        if isinstance(child, Metric):
            child.__dict__.update(forward=_zero, update=_ignore, compute=_zero, reset=_ignore)


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


def _zero(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(())
