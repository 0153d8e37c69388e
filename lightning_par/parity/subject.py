"""What is checked: the user's module, set up and with weights in memory, and small batches of the user's data."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_par.host.batch import split_batch
from lightning_par.host.preflight import plan_from_trainer, set_up
from lightning_par.layout import Layout
from lightning_par.materialize import match_weights, materialize_rest
from lightning_par.parity.sample import small_batches
from lightning_par.parity.shrink import is_large, shrink
from lightning_par.prepare import batch_size_of


@dataclass(frozen=True)
class Subject:
    """What every process trains.

    Attributes:
        module: the user's, as initialised.
        source: what Trainer gets for its data, without its loaders: a data module, or None where the module's hooks serve.
        batches: of all replicas together, by step.
        layout: all sizes known.
        size: how much of the module this is, for the user.
        samples: of the first batch.
    """

    module: Any
    source: Any
    batches: list[Any]
    layout: Layout
    size: str
    samples: int

    def data(self, dp_size: int, dp_rank: int) -> Any:
        """What ``trainer.fit`` gets after the module: the part of the batches that one replica reads."""
        parts = [split_batch(batch, dp_size)[dp_rank][0] for batch in self.batches]
        loader: DataLoader[Any] = DataLoader(parts, batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]
        if self.source is None:
            return loader
        source = copy.copy(self.source)
        source.__dict__["train_dataloader"] = lambda: loader
        return source


def prepare_subject(trainer: Any, module: Any, data: Any, num_steps: int, is_full: bool) -> Subject:
    """Set the user's objects up for a run that starts in other processes.

    Args:
        trainer: with the layout that is checked.
        module, data: what its ``fit`` would get. The module is changed: its hooks for setting up have done their work.
        num_steps: batches that are needed.
        is_full: whether a large module stays as large as it is.

    Raises:
        ConfigurationError: the module, its data and the layout do not go together.
    """
    source = data if hasattr(data, "prepare_data") else None
    module.__dict__["_trainer"] = trainer
    if source is not None:
        source.trainer = trainer
    set_up(module, module if source is None else source, trainer.strategy, "fit")
    weights = None if trainer.strategy.options.weights is None else match_weights(module, trainer.strategy.options.weights)
    _has_been_set_up(module)
    if source is not None:
        _has_been_set_up(source)
    given = () if data is None else (data,)
    trainer.strategy.options = replace(trainer.strategy.options, weights=None)  # a smaller module would not need all that are there
    plan, size = plan_from_trainer(trainer, "fit", module, *given), "full size"
    if not is_full and is_large(module):
        plan, size = shrink(module, plan, lambda: plan_from_trainer(trainer, "fit", module, *given))
    loaders = data if source is None and data is not None else (source or module).train_dataloader()
    layout = plan.layout if plan.layout.microbatches is not None else replace(plan.layout, microbatches=1)
    batches = small_batches(loaders, layout, num_steps)
    _fill(module, weights)
    module.__dict__["_trainer"] = None
    return Subject(module, source, batches, layout, size, batch_size_of(batches[0]))


def _has_been_set_up(owner: Any) -> None:
    """Have the Trainers of the processes leave out what was done here; nor do they need the callbacks of the module's own."""
    owner.__dict__.update(prepare_data=_do_nothing, setup=_do_nothing, configure_model=_do_nothing, configure_callbacks=list)


def _fill(module: nn.Module, weights: Any) -> None:
    """Give all weights their memory and initial values, as one process would."""
    materialize_rest(module)
    if weights is not None:
        aliases: dict[torch.Tensor, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            aliases.setdefault(parameter, []).append(name)
        for tensor, names in aliases.items():
            weights.read_shard(names, None, 1, 0, tensor.dtype, tensor.data)
        weights.read_buffers(module)


def _as_it_is(batch: Any) -> Any:
    return batch


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None
