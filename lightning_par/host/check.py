"""What a Trainer, its callbacks, its checkpoints and its module may not be, found before any other process is started."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_par.checkpoint import Checkpoint
from lightning_par.engine import Engine
from lightning_par.errors import ConfigurationError
from lightning_par.host.precision import check_device
from lightning_par.host.timeline import PipelineTimeline
from lightning_par.layout import Coordinate, Layout
from lightning_par.plan.nearest import use_instead
from lightning_par.runtime.parameter import has_spec
from lightning_par.runtime.precision import Precision
from lightning_par.tensor import check_float8


def check_run(trainer: Any, given: Iterable[Any]) -> None:
    """Check everything about a run that can be said without its module and data.

    Args:
        trainer: the Trainer.
        given: what its function was called with.

    Raises:
        ConfigurationError: the precision, float8, a callback or a checkpoint cannot work.
    """
    strategy = trainer.strategy
    check_device(strategy.precision, strategy.root_device)
    check_callbacks(trainer)
    if strategy.options.overrides.get("fp8") is not None:
        check_float8(strategy.options.overrides["fp8"], strategy.root_device, strategy.precision.name)
    check_checkpoints(given)


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


def check_checkpoints(given: Iterable[Any]) -> None:
    """Check a ``ckpt_path`` among a Trainer's arguments, where it names a folder.

    Raises:
        CheckpointError: it is no checkpoint of this strategy, or damaged.
    """
    for value in given:
        if isinstance(value, (str, Path)) and Path(value).exists():
            Checkpoint(Path(value))


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
            f"backward and the step itself: {_without_pipeline(layout)}, or automatic optimization"
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
            f"pipeline or ZeRO steps one: put the parameters into groups of one optimizer, or {_without_pipeline(layout)}"
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
    return use_instead(replace(layout, zero=0, microbatches=None), lambda near: near.pp == 1)
