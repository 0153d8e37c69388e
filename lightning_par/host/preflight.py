"""The plan of a Trainer's run, made in one process before any other is started, with whatever it shows to be wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from lightning_par.errors import ModelError
from lightning_par.host.check import check_manual, check_optimization
from lightning_par.host.construction import configuring, weights_untouched
from lightning_par.host.first_batch import first_batch
from lightning_par.host.loss_weight import check_loss_weight
from lightning_par.host.memory import Foresight, fit_memory, memory_budget, with_memory
from lightning_par.host.whole_parts import explain_sizes, note_whole_parts
from lightning_par.layout import Layout
from lightning_par.materialize import match_weights, materialize_attributes
from lightning_par.pipeline.schedules import check_schedule, default_schedule
from lightning_par.pipeline.tables import choose_schedule
from lightning_par.plan import Plan
from lightning_par.plan.nearest import tried_by
from lightning_par.prepare import prepare_plan
from lightning_par.private.deepspeed import check_operator
from lightning_par.runtime.generator import generators_put_back
from lightning_par.trace.copying import copy_module
from lightning_par.zero.nvme import check_files
from lightning_par.zero.optimizer import check_optimizer

_STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
_LOADERS = {"fit": "train_dataloader", "validate": "val_dataloader", "test": "test_dataloader", "predict": "predict_dataloader"}


def plan_from_trainer(
    trainer: Any, what: str, *args: Any, foresees: bool = False, keep: Callable[..., None] | None = None, **kwargs: Any
) -> Plan:
    """The plan of the run that the Trainer is about to start.

    Works on copies: the user's module, its datamodule and all random states stay as they are.

    Args:
        trainer: the Trainer; its strategy says the layout, dp resolved, and the options.
        what: the Trainer's verb: ``fit``, ``validate``, ``test`` or ``predict``.
        foresees: whether to find out what the ranks store even if nothing depends on it.
        keep: given what `rehearsed` yields, in ``fit``.
        *args, **kwargs: what the Trainer's function was called with; the module first, then its data.

    Raises:
        ConfigurationError: whatever cannot work.
    """
    strategy = trainer.strategy
    layout = strategy.layout
    with rehearsed(trainer, what, *args, **kwargs) as (twin, batch, optimizers):

        def decide(one: Layout, foresees: bool = False) -> Plan:
            if one != layout:
                one = _placed(one, layout, strategy.schedule)
            plan = _plan_checked(twin, batch, one, strategy, _STEPS[what])
            return _with_memory(plan, one, twin, batch, optimizers, strategy, foresees) if what == "fit" else plan

        with tried_by(decide):
            plan = decide(layout, foresees)
        if keep is not None and what == "fit":
            keep(twin, batch, optimizers)
    if what == "fit" and layout.pp > 1:
        check_schedule(strategy.schedule, layout.pp, layout.vp, plan.layout.microbatches)
    return plan


def _placed(near: Layout, layout: Layout, schedule: str) -> Layout:
    """Another layout than that of the run, with the stages where its schedule has them; the usual schedule follows the layout.

    Raises:
        ConfigurationError: the schedule cannot run it.
    """
    return choose_schedule(None if schedule == default_schedule(layout.vp) else schedule, near)[1]


@contextmanager
def rehearsed(trainer: Any, what: str, *args: Any, **kwargs: Any) -> Iterator[tuple[Any, Any, list[Any] | None]]:
    """Copies that have been through what a Trainer does before the first step, and the first batch.

    Args:
        trainer: the Trainer.
        what: its verb.
        *args, **kwargs: what its function was called with; the module first, then its data.

    Yields:
        The copy of the module, the batch as its step gets it, and in ``fit`` the optimizers; None where they are not known.

    Raises:
        ConfigurationError: whatever cannot work.
    """
    strategy = trainer.strategy
    layout = strategy.layout
    module = args[0] if args and args[0] is not None else trainer.lightning_module
    given = [value for value in (*args, *kwargs.values()) if value is not module]
    datamodule = next((value for value in given if hasattr(value, "prepare_data")), trainer.datamodule)
    loaders = args[1] if len(args) > 1 and args[1] is not datamodule else None
    check_manual(module, layout)
    with generators_put_back(), _loggers_silent(trainer):
        twin: Any = copy_module(module, lambda tensor: tensor, by_reference=[trainer])
        twin.__dict__["_trainer"] = trainer
        source = twin if datamodule is None else _copied(datamodule, trainer)
        set_up(twin, source, strategy, what)
        optimizers = _configure_optimizers(twin, layout) if what == "fit" else None
        if optimizers is not None and layout.zero and layout.dp != 1:
            check_files(strategy.options.zero, optimizers[0], strategy.root_device)
        yield (
            twin,
            _converted_batch(getattr(source, _LOADERS[what])() if loaders is None else loaders, twin, source, what),
            optimizers,
        )


def set_up(twin: Any, source: Any, strategy: Any, what: str) -> None:
    """Have a module and its data do what a Trainer has them do before the first batch.

    Args:
        twin: the module, or a copy of it; knows its Trainer.
        source: what makes the loaders: the module itself, or a data module.
        strategy: of the run.
        what: the Trainer's verb.
    """
    for owner in dict.fromkeys((source, twin)):
        owner.prepare_data()
        with weights_untouched(twin):
            owner.setup(what)
    with strategy.precision.creating(), configuring(twin, strategy.options.init):
        twin.configure_model()
    materialize_attributes(twin)
    if strategy.options.weights is not None:
        match_weights(twin, strategy.options.weights)


def _converted_batch(loaders: Any, twin: Any, source: Any, what: str) -> Any:
    """The first batch as the step will get it."""
    batch = first_batch(loaders if what == "fit" else _first(loaders))
    batch = twin.trainer.precision_plugin.convert_input(batch)
    for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
        batch = getattr(source if _overrides(source, hook) else twin, hook)(batch, 0)
    return batch


def _plan_checked(twin: Any, batch: Any, layout: Layout, strategy: Any, step: str) -> Plan:
    """The plan for a batch that can be cut as it says, its targets counted."""
    count, precision, overrides = strategy.options.loss_weight, strategy.precision, strategy.options.overrides
    try:
        plan = prepare_plan(twin, batch, layout, overrides, step, counts_targets=count is not None, precision=precision)
    except Exception as error:
        explain_sizes(batch, step, error)
        raise
    if step == "training_step" and count is not None:
        check_loss_weight(count, twin, batch, plan.layout.microbatches or 1)
    return replace(plan, notes=plan.notes + note_whole_parts(twin, batch, plan, step, precision))


def _with_memory(
    plan: Plan, asked: Layout, twin: Any, batch: Any, optimizers: Sequence[Any] | None, strategy: Any, foresees: bool
) -> Plan:
    """The plan with the memory of its ranks, where somebody asks; it fits what they have."""
    options = strategy.options
    budget = memory_budget(options.memory_gib, strategy.root_device, options.overrides)
    with nullcontext() if budget is not None else suppress(ModelError):  # where nothing depends on it
        if budget is not None or foresees:
            zero = options.zero if plan.layout.zero else None
            foresight = Foresight(twin, batch, optimizers, strategy.schedule, strategy.precision, zero)
            return with_memory(plan, foresight) if budget is None else fit_memory(plan, asked, budget, options.overrides, foresight)
    return plan


def leave_inference_mode(trainer: Any) -> None:
    """Have evaluations run under ``torch.no_grad`` with ZeRO-3: parameters gathered in inference mode could not be trained on.

    Lightning itself leaves it to the loops of ``validate``, ``test`` and ``predict``, and over gloo to none.
    """
    if trainer.strategy.layout.zero == 3:
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False


def _configure_optimizers(twin: Any, layout: Layout) -> list[Any] | None:
    """Check what configure_optimizers returns, and let the dry run's ``self.optimizers()`` give it.

    Where it needs a running Trainer nothing is found here; what it raises, it raises again where it counts. The number of steps,
    which most schedulers ask the Trainer for, is made up.

    Returns:
        The optimizers; None where they are not known.
    """
    trainer = twin.__dict__["_trainer"]
    twin.__dict__["_trainer"] = SimpleNamespace(estimated_stepping_batches=1000, max_steps=1000, max_epochs=10)
    try:
        configured = twin.configure_optimizers()
    except Exception as error:
        check_operator(error)
        return None
    finally:
        twin.__dict__["_trainer"] = trainer
    if isinstance(configured, tuple) and len(configured) == 2 and isinstance(configured[0], list):
        configured = configured[0]  # optimizers and schedulers
    several = configured if isinstance(configured, (list, tuple)) else [configured]
    optimizers = [entry["optimizer"] if isinstance(entry, Mapping) else entry for entry in several]
    check_optimization(twin, optimizers, layout)
    if layout.zero and layout.dp != 1:
        check_optimizer(layout.zero, optimizers)
    twin.__dict__["optimizers"] = lambda use_pl_optimizer=True: optimizers[0] if len(optimizers) == 1 else optimizers
    return optimizers


def _copied(datamodule: Any, trainer: Any) -> Any:
    with suppress(Exception):  # holds what cannot be copied; Lightning, too, sets it up again in every process
        datamodule = copy.deepcopy(datamodule)
    datamodule.trainer = trainer
    return datamodule


@contextmanager
def _loggers_silent(trainer: Any) -> Iterator[None]:
    """Inside, the Trainer's loggers take everything and write nothing."""
    loggers = trainer.loggers
    silent = import_module(f"{type(trainer).__module__.removesuffix('.trainer.trainer')}.loggers.logger").DummyLogger
    trainer.loggers = [silent() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


def _first(loaders: Any) -> Any:
    """Evaluation loaders run one after the other."""
    return loaders[0] if isinstance(loaders, (list, tuple)) else loaders


def _overrides(owner: Any, hook: str) -> bool:
    """Whether the user wrote this hook."""
    method = getattr(type(owner), hook, None)
    return method is not None and not method.__module__.startswith(("pytorch_lightning.", "lightning."))
