"""The dry run itself: one step of the user's module on fake tensors, every torch function recorded."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_par.errors import ModelError
from lightning_par.materialize import is_deferred, whole_value
from lightning_par.private.torch import FakeTensorMode, is_data_dependent
from lightning_par.runtime.generator import generators_put_back
from lightning_par.runtime.nested import map_tensors
from lightning_par.runtime.precision import FULL, Precision
from lightning_par.trace.bound import bound_parameters
from lightning_par.trace.chain import Containers, find_containers
from lightning_par.trace.copying import copy_module
from lightning_par.trace.loop import PassesSeen
from lightning_par.trace.record import Trace
from lightning_par.trace.recorder import Recorder

Prepare = Callable[[nn.Module], None]


def trace_step(
    module: nn.Module,
    batch: Any,
    *,
    batch_size: int,
    step: str = "training_step",
    chain: str | Sequence[str] | None = None,
    may_join: bool = True,
    may_mix: bool = False,
    prepare: Prepare | None = None,
    keep_error: bool = False,
    is_real: bool = False,
    evaluates: bool = False,
    precision: Precision = FULL,
) -> Trace:
    """Run one step of a copy of ``module`` on fake tensors and record it. No memory for weights, no side effect.

    A step that fails on fake tensors (its control flow or shapes depend on values) is run on copies of the real ones. One
    that is not trained and goes on calling its blocks, as to generate tokens, is left when it has run them twice. A chain whose
    blocks do not run once each in order is none; the trace says why in ``chains_seen``.

    Args:
        module: the user's LightningModule, untouched.
        batch: one batch as the step gets it.
        batch_size: its number of samples.
        step: the hook to run.
        chain: container of the blocks, or all of them, when the user's plan names it.
        may_join: whether several containers whose blocks run one container after the other are one chain, where none is named.
        may_mix: whether blocks of several classes are a chain, where no container has blocks of one.
        prepare: called with the copy before it runs, to install parallel layers on it.
        keep_error: when the step raises, give the trace up to there with the error in it.
        is_real: do not try fake tensors, an earlier run has failed on them.
        evaluates: run it in evaluation mode, gradients included; other steps than ``training_step`` always are, without them.
        precision: in which the step computes.

    Raises:
        ModelError: the step returned None, or the chosen chain is none.
        PlanError: ``chain`` names nothing.
    """
    containers = find_containers(module, chain, may_mix)
    containers = containers if may_join else replace(containers, may_join=())
    mode = _Mode(step, is_training=step == "training_step" and not evaluates, prepare=prepare, precision=precision)
    recorder, output, error, is_real = _run(module, batch, mode, containers, keep_error, is_real)
    seen = containers.seen
    if error is None and recorder.calls.fault is not None:
        assert containers.main is not None
        if chain is not None:
            raise ModelError(
                f"plan.chain={as_typed(chain)} is no chain of blocks: {recorder.calls.fault}. Name another, or leave the line out"
            )
        seen = (*seen, (containers.main, recorder.calls.fault))
        recorder, output, error, is_real = _run(module, batch, mode, Containers(None), keep_error, is_real)
    if error is not None and not keep_error:
        _explain_dry_run(error, step)
        raise error
    if step == "training_step" and error is None and getattr(module, "automatic_optimization", True):
        _check_loss(output, type(module).__name__)
    return replace(recorder.finish(step, seen, batch_size, error), is_real=is_real, bound=bound_parameters(module))


@dataclass(frozen=True)
class _Mode:
    step: str
    is_training: bool
    prepare: Prepare | None
    precision: Precision


def _run(
    module: nn.Module, batch: Any, mode: _Mode, containers: Containers, keep_error: bool, is_real: bool
) -> tuple[Recorder, Any, Exception | None, bool]:
    """On fake tensors, and where that fails on real ones, which the last item of the result says."""
    if not is_real:
        recorder, output, error = _run_once(module, batch, mode, containers, FakeTensorMode(allow_non_fake_inputs=True))
        if error is None or (keep_error and not is_data_dependent(error)):
            return recorder, output, error, False
    return *_run_once(module, batch, mode, containers, None), True


def _run_once(
    module: nn.Module, batch: Any, mode: _Mode, containers: Containers, fake: FakeTensorMode | None
) -> tuple[Recorder, Any, Exception | None]:
    copied = _clone if fake is None else partial(fake_of, fake)
    has_gradients = mode.step == "training_step"
    with generators_put_back(), _in_the_open(), fake or contextlib.nullcontext():
        twin = silent_copy(module, lambda tensor: mode.precision.convert(copied(tensor)))
        if mode.prepare is not None:
            mode.prepare(twin)
        inputs = map_tensors(lambda tensor: copied(tensor.detach()), batch)
        recorder = Recorder(twin, containers, inputs, may_loop=not has_gradients)
        twin.__dict__.update(dict.fromkeys(("log", "log_dict"), recorder.log))
        twin.train(mode.is_training)
        output, failure = None, None
        with torch.set_grad_enabled(has_gradients), _counter(recorder) as flops, recorder.running(flops):
            try:
                with mode.precision.computing(_device_type(twin)):  # a deferred module is nowhere
                    output = getattr(twin, mode.step)(inputs, 0)
            except PassesSeen:
                pass
            except Exception as error:
                failure = error
        recorder.returned(output)
    return recorder, output, failure


@contextlib.contextmanager
def _in_the_open() -> Iterator[None]:
    """Compiled modules run as written, or their operations would not be seen; torch says nothing of fakes that fail here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        logger.disabled = was_disabled


def _counter(recorder: Recorder) -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=recorder.attention.mapping)


def _device_type(module: nn.Module) -> str:
    return next((parameter.device.type for parameter in module.parameters()), "cpu")


def fake_of(fake: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A fake of a tensor, whether that has memory or not."""
    if not is_deferred(tensor):
        return fake.from_tensor(tensor)
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)  # on the CPU, where it is going to be made
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    twin = whole_value(tensor) if is_deferred(tensor) else tensor.detach().clone()
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def as_typed(chain: str | Sequence[str]) -> str:
    """A line ``plan.chain`` as the user wrote it."""
    return chain if isinstance(chain, str) else f"[{', '.join(chain)}]"


def _explain_dry_run(error: Exception, step: str) -> None:
    """Tell a traceback from the user's own code where it comes from (Python 3.11 and later)."""
    if hasattr(error, "add_note"):
        error.add_note(
            f"lightning_par: raised in the dry run of {step} from which the plan is made. It runs on a copy of the module before "
            "the Trainer does, so that what only a running Trainer has (its loaders, its schedulers) is not there yet"
        )


def _check_loss(output: Any, name: str) -> None:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, torch.Tensor):
        what = "None" if output is None else f"a {type(output).__name__} without a loss tensor"
        raise ModelError(f"{name}.training_step returned {what}: a parallel run needs the loss of every batch, return that tensor")
    if loss.numel() != 1:
        raise ModelError(
            f"{name}.training_step returned a loss of shape {tuple(loss.shape)}, and the backward starts from one number: return "
            "its mean, loss.mean()"
        )


def silent_copy(module: nn.Module, replace: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy of a LightningModule on other tensors, see `copy_module`, with its ways out cut.

    Metrics, logs, prints and a backward of a dry run mean nothing.
    """
    from torchmetrics import Metric

    twin = copy_module(module, replace, by_reference=[getattr(module, "_trainer", None)])
    ways_out = ("log", "log_dict", "print", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
    twin.__dict__.update(dict.fromkeys(ways_out, _ignore))
    for child in list(twin.modules()):
        if isinstance(child, Metric):
            child.__dict__.update(forward=_zero, update=_ignore, compute=_zero, reset=_ignore)
    return twin


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


def _zero(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(())
