"""What is found wrong before any other process is started: the plan of a Trainer's run, made in one process."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning_par.checkpoint import check_layout
from lightning_par.engine import Engine
from lightning_par.errors import ConfigurationError, ModelError
from lightning_par.host.construction import configuring, weights_untouched
from lightning_par.host.first_batch import first_batch
from lightning_par.host.loss_weight import TargetCount, check_loss_weight
from lightning_par.host.memory import Foresight, fit_memory, memory_budget, with_memory
from lightning_par.host.timeline import PipelineTimeline
from lightning_par.host.whole_parts import explain_sizes, note_whole_parts
from lightning_par.layout import Coordinate, Layout, nearest_layouts
from lightning_par.materialize import match_weights, materialize_attributes
from lightning_par.pipeline.schedules import check_schedule
from lightning_par.plan import Plan
from lightning_par.prepare import prepare_plan
from lightning_par.private.deepspeed import check_operator
from lightning_par.runtime.generator import generators_put_back
from lightning_par.runtime.parameter import has_spec
from lightning_par.runtime.precision import Precision
from lightning_par.trace.copying import copy_module
from lightning_par.zero.nvme import check_files
from lightning_par.zero.optimizer import check_optimizer

_STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
_LOADERS = {"fit": "train_dataloader", "validate": "val_dataloader", "test": "test_dataloader", "predict": "predict_dataloader"}


def plan_from_trainer(
    trainer: Any, layout: Layout, overrides: Mapping[str, Any], what: str, *args: Any, foresees: bool = False, **kwargs: Any
) -> Plan:
    """The plan of the run that the Trainer is about to start.

    Works on copies: the user's module, its datamodule and all random states stay as they are.

    Args:
        trainer: the Trainer.
        layout: sizes of the axes, dp resolved.
        overrides: the user's plan section.
        what: the Trainer's verb: ``fit``, ``validate``, ``test`` or ``predict``.
        foresees: whether to find out what the ranks store even if nothing depends on it.
        *args, **kwargs: what the Trainer's function was called with; the module first, then its data.

    Raises:
        ConfigurationError: whatever cannot work.
    """
    given = [*args, *kwargs.values()]
    module = args[0] if args and args[0] is not None else trainer.lightning_module
    datamodule = next((value for value in given if hasattr(value, "prepare_data") and value is not module), trainer.datamodule)
    precision = trainer.strategy.precision
    check_manual(module, layout)
    with generators_put_back(), _loggers_silent(trainer):
        twin: Any = copy_module(module, lambda tensor: tensor, by_reference=[trainer])
        twin.__dict__["_trainer"] = trainer
        source = twin if datamodule is None else _copied(datamodule, trainer)
        for owner in dict.fromkeys((source, twin)):
            owner.prepare_data()
            with weights_untouched(twin):
                owner.setup(what)
        with precision.creating(), configuring(twin, trainer.strategy.init):
            twin.configure_model()
        materialize_attributes(twin)
        if trainer.strategy.weights is not None:
            match_weights(twin, trainer.strategy.weights)
        optimizers = _configure_optimizers(twin, layout) if what == "fit" else None
        if optimizers is not None and layout.zero and layout.dp != 1:
            check_files(trainer.strategy.zero_options, optimizers[0], trainer.strategy.root_device)
        loaders = args[1] if len(args) > 1 and args[1] is not None and args[1] is not datamodule else None
        if loaders is None:
            loaders = getattr(source, _LOADERS[what])()
        batch = trainer.precision_plugin.convert_input(first_batch(loaders if what == "fit" else _first(loaders)))
        for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
            batch = getattr(source if _overrides(source, hook) else twin, hook)(batch, 0)
        plan = _plan_checked(twin, batch, layout, overrides, _STEPS[what], trainer.strategy.loss_weight, precision)
        if what == "fit":
            plan = _with_memory(plan, twin, batch, optimizers, trainer.strategy, foresees)
    if what == "fit" and layout.pp > 1:
        check_schedule(trainer.strategy.schedule, layout.pp, layout.vp, plan.layout.microbatches)
    return plan


def _plan_checked(
    twin: Any,
    batch: Any,
    layout: Layout,
    overrides: Mapping[str, Any],
    step: str,
    count: TargetCount | None,
    precision: Precision,
) -> Plan:
    """The plan for a batch that can be cut as it says, its targets counted."""
    try:
        plan = prepare_plan(twin, batch, layout, overrides, step, counts_targets=count is not None, precision=precision)
    except Exception as error:
        explain_sizes(batch, step, error)
        raise
    if step == "training_step" and count is not None:
        check_loss_weight(count, twin, batch, plan.layout.microbatches or 1)
    return replace(plan, notes=plan.notes + note_whole_parts(twin, batch, plan, step, precision))


def _with_memory(plan: Plan, twin: Any, batch: Any, optimizers: Sequence[Any] | None, strategy: Any, foresees: bool) -> Plan:
    """The plan with the memory of its ranks, where somebody asks; it fits what they have."""
    budget = memory_budget(strategy.memory_gib, strategy.root_device, strategy.overrides)
    with nullcontext() if budget is not None else suppress(ModelError):  # where nothing depends on it
        if budget is not None or foresees:
            zero = strategy.zero_options if plan.layout.zero else None
            foresight = Foresight(twin, batch, optimizers, strategy.schedule, strategy.precision, zero)
            return with_memory(plan, foresight) if budget is None else fit_memory(plan, budget, strategy.overrides, foresight)
    return plan


def check_split(module: Any, layout: Layout, precision: Precision) -> Engine | None:
    """The engine of a module that an earlier Trainer has split; None for a whole one.

    Raises:
        ConfigurationError: it was split in another layout or precision, or is a part of a module that was split.
    """
    engine = Engine.of(module)
    if engine is not None and replace(engine.mesh.layout, microbatches=layout.microbatches) != layout:
        raise ConfigurationError(
            f"parallel={layout}: this {type(module).__name__} is already split as parallel={engine.mesh.layout}: use the same "
            "layout, or build the module anew and load a checkpoint"
        )
    if engine is not None and engine.precision != precision:
        raise ConfigurationError(
            f"precision={precision.name}: this {type(module).__name__} is already split with precision={engine.precision.name}: "
            "use that, or build the module anew and load a checkpoint"
        )
    if engine is None and any(has_spec(parameter) for parameter in module.parameters()):
        raise ConfigurationError(
            f"this {type(module).__name__} contains a model that is already split, as part of another LightningModule: use that "
            "one, or build the model anew and load a checkpoint"
        )
    return engine


def check_checkpoints(given: Iterable[Any], layout: Layout) -> None:
    """Check a ``ckpt_path`` among a Trainer's arguments, where it names a folder.

    Raises:
        CheckpointError: it is no checkpoint of this strategy.
        LayoutError: another layout wrote it.
    """
    for value in given:
        if isinstance(value, (str, Path)) and Path(value).exists():
            check_layout(Path(value), layout)


def leave_inference_mode(trainer: Any) -> None:
    """Have evaluations run under ``torch.no_grad`` with ZeRO-3: parameters gathered in inference mode could not be trained on.

    Lightning itself leaves it to the loops of ``validate``, ``test`` and ``predict``, and over gloo to none.
    """
    if trainer.strategy.layout.zero == 3:
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False


def check_callbacks(trainer: Any) -> None:
    """Refuse callbacks that would go wrong silently on a split module, and a timeline of no pipeline.

    Raises:
        ConfigurationError: names the callback and what to do instead.
    """
    layout = trainer.strategy.layout
    for callback in trainer.callbacks:
        if isinstance(callback, PipelineTimeline):
            callback.check_layout(layout)
        names = {cls.__name__ for cls in type(callback).__mro__}
        if names & {"StochasticWeightAveraging", "WeightAveraging"}:
            raise ConfigurationError(
                f"{type(callback).__name__} averages whole weights and would average this rank's shards of them: remove the "
                "callback, or average checkpoints after the run"
            )
        if "BaseFinetuning" in names and layout.zero:
            raise ConfigurationError(
                f"{type(callback).__name__} adds parameters to the optimizer during the run, and zero{layout.zero} has sharded "
                "its states at the start: use zero0, or freeze and unfreeze by learning rate"
            )
    if getattr(trainer.strategy, "_layer_sync", None) is not None:
        raise ConfigurationError("sync_batchnorm=True is not supported: use GroupNorm or LayerNorm, or sync_batchnorm=False")


def check_manual(module: Any, layout: Layout) -> None:
    """Manual optimization runs its own backward, which a pipeline schedule cannot.

    Raises:
        ConfigurationError: with a pipeline or sharded states.
    """
    if not module.automatic_optimization and (layout.pp > 1 or layout.zero):
        raise ConfigurationError(
            f"parallel={layout}: {type(module).__name__} has automatic_optimization=False, and a pipeline or ZeRO runs the "
            f"backward and the step itself: use {_without_pipeline(layout)}, or automatic optimization"
        )


def check_optimization(module: Any, optimizers: list[Any], layout: Layout) -> None:
    """One optimizer with a pipeline or sharded states.

    Raises:
        ConfigurationError: several, or none.
    """
    check_manual(module, layout)
    if len(optimizers) > 1 and (layout.pp > 1 or layout.zero):
        raise ConfigurationError(
            f"parallel={layout}: {type(module).__name__}.configure_optimizers returns {len(optimizers)} optimizers, and a "
            f"pipeline or ZeRO steps one: put the parameters into groups of one optimizer, or use {_without_pipeline(layout)}"
        )


def check_trainable(module: Any, coordinate: Coordinate, error: ValueError) -> None:
    """Tell what torch says of an optimizer without parameters in the words of the layout.

    Raises:
        ConfigurationError: ``error`` is that, on a stage where everything is frozen.
    """
    if "empty parameter list" in str(error) and not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigurationError(
            f"stage {coordinate.pp} holds no trainable parameter, and every stage has an optimizer: move the cuts with "
            "plan.stages=[...], or use pp1"
        ) from error


def _without_pipeline(layout: Layout) -> str:
    near = nearest_layouts(replace(layout, zero=0, microbatches=None), layout.world_size, fits=lambda near: near.pp == 1)
    return " or ".join(f"parallel={each}" for each in near)


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
