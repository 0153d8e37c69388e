"""What is found wrong before any other process is started: the plan of a Trainer's run, made in one process."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_par.engine import Engine
from lightning_par.errors import ConfigurationError
from lightning_par.host.first_batch import first_batch
from lightning_par.layout import Layout
from lightning_par.plan import Plan
from lightning_par.prepare import prepare_plan
from lightning_par.runtime.parameter import has_spec
from lightning_par.trace.copying import copy_module

_STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
_LOADERS = {"fit": "train_dataloader", "validate": "val_dataloader", "test": "test_dataloader", "predict": "predict_dataloader"}


def plan_from_trainer(trainer: Any, layout: Layout, overrides: Mapping[str, Any], *args: Any, **kwargs: Any) -> Plan:
    """The plan of the run that the Trainer is about to start.

    Works on copies: the user's module, its datamodule and all random states stay as they are.

    Args:
        trainer: a Trainer inside fit, validate, test or predict.
        layout: sizes of the axes, dp resolved.
        overrides: the user's plan section.
        *args, **kwargs: what the Trainer's function was called with; the module first, then its data.

    Raises:
        ConfigurationError: whatever cannot work.
    """
    what = str(trainer.state.fn.value)
    given = [*args, *kwargs.values()]
    module = args[0] if args and args[0] is not None else trainer.lightning_module
    datamodule = next((value for value in given if hasattr(value, "prepare_data") and value is not module), trainer.datamodule)
    check_manual(module, layout)
    twin = copy_module(module, lambda tensor: tensor, by_reference=[trainer])
    twin.__dict__["_trainer"] = trainer
    loaders, source = _loaders(what, twin, datamodule, args[1] if len(args) > 1 else None, trainer)
    _build(twin, what)
    if what == "fit":
        _check_optimizers_early(twin, layout)
    batch = first_batch(loaders)
    for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
        owner = source if source is not None and _overrides(source, hook) else twin
        batch = getattr(owner, hook)(batch, 0)
    return prepare_plan(twin, batch, layout, overrides, _STEPS[what])


def check_split(module: Any, layout: Layout) -> Engine | None:
    """The engine of a module that an earlier Trainer has split; None for a whole one.

    Raises:
        ConfigurationError: it was split in another layout, or is a part of a module that was split.
    """
    engine = Engine.of(module)
    if engine is not None and replace(engine.mesh.layout, microbatches=layout.microbatches) != layout:
        raise ConfigurationError(
            f"parallel={layout}: this {type(module).__name__} is already split as parallel={engine.mesh.layout}: use the same layout, or "
            "build the module anew and load a checkpoint"
        )
    if engine is None and any(has_spec(parameter) for parameter in module.parameters()):
        raise ConfigurationError(
            f"this {type(module).__name__} contains a model that is already split, as part of another LightningModule: use that one, or "
            "build the model anew and load a checkpoint"
        )
    return engine


def check_callbacks(trainer: Any) -> None:
    """Refuse callbacks that would go wrong silently on a split module.

    Raises:
        ConfigurationError: names the callback and what to do instead.
    """
    layout = trainer.strategy.layout
    for callback in trainer.callbacks:
        names = {cls.__name__ for cls in type(callback).__mro__}
        if names & {"StochasticWeightAveraging", "WeightAveraging"}:
            raise ConfigurationError(
                f"{type(callback).__name__} averages whole weights and would average this rank's shards of them: remove the callback, or "
                "average checkpoints after the run"
            )
        if "BaseFinetuning" in names and layout.zero:
            raise ConfigurationError(
                f"{type(callback).__name__} adds parameters to the optimizer during the run, and zero{layout.zero} has sharded its states at "
                "the start: use zero0, or freeze and unfreeze by learning rate"
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
            f"parallel={layout}: {type(module).__name__} has automatic_optimization=False, and a pipeline or ZeRO runs the backward and the "
            "step itself: use pp1 and zero0, or automatic optimization"
        )


def check_optimization(module: Any, optimizers: list[Any], layout: Layout) -> None:
    """One optimizer with a pipeline or sharded states.

    Raises:
        ConfigurationError: several, or none.
    """
    check_manual(module, layout)
    if len(optimizers) > 1 and (layout.pp > 1 or layout.zero):
        raise ConfigurationError(
            f"parallel={layout}: {type(module).__name__}.configure_optimizers returns {len(optimizers)} optimizers, and a pipeline or ZeRO "
            "steps one: put the parameters into groups of one optimizer, or use pp1 and zero0"
        )


def _check_optimizers_early(twin: Any, layout: Layout) -> None:
    """Look at configure_optimizers where it needs no running Trainer; what it raises here, it raises again where it counts."""
    if layout.pp == 1 and not layout.zero:
        return
    trainer = twin.__dict__.pop("_trainer")
    twin.__dict__["_trainer"] = None
    try:
        optimizers = twin.configure_optimizers()
    except Exception:
        return
    finally:
        twin.__dict__["_trainer"] = trainer
    if isinstance(optimizers, tuple) and len(optimizers) == 2 and isinstance(optimizers[0], list):
        optimizers = optimizers[0]
    check_optimization(twin, list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers], layout)


def _loaders(what: str, twin: Any, datamodule: Any, given: Any, trainer: Any) -> tuple[Any, Any]:
    """The loaders of a run and the datamodule they came from: given, the datamodule's, or the module's own."""
    if given is not None and given is not datamodule:
        return (given if what == "fit" else _first(given)), None
    source = twin
    if datamodule is not None:
        try:
            source = copy.deepcopy(datamodule)
        except Exception:  # holds what cannot be copied; Lightning, too, sets it up again in every process
            source = datamodule
        source.trainer = trainer
    source.prepare_data()
    if source is not twin:
        source.setup(what)
    loaders = getattr(source, _LOADERS[what])()
    return (loaders if what == "fit" else _first(loaders)), (source if source is not twin else None)


def _build(twin: Any, what: str) -> None:
    """Hooks that may still add layers."""
    if _overrides(twin, "setup"):
        twin.setup(what)
    if _overrides(twin, "configure_model"):
        twin.configure_model()


def _first(loaders: Any) -> Any:
    """Evaluation loaders run one after the other."""
    return loaders[0] if isinstance(loaders, (list, tuple)) else loaders


def _overrides(owner: Any, hook: str) -> bool:
    """Whether the user wrote this hook."""
    method = getattr(type(owner), hook, None)
    return method is not None and not method.__module__.startswith(("pytorch_lightning.", "lightning."))
