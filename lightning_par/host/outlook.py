"""A Trainer's module taken apart for the planner, and a search for layouts from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_par.errors import ModelError
from lightning_par.host.batch import batch_size, repeat_samples
from lightning_par.host.loss import loss_of
from lightning_par.host.preflight import rehearsed
from lightning_par.layout import Layout
from lightning_par.memory import read_optimizer
from lightning_par.memory.optimizer import OptimizerForm
from lightning_par.planner import Anatomy, Cluster, Outlook, search
from lightning_par.planner.anatomy import ROWS, Say
from lightning_par.planner.asked import judge
from lightning_par.planner.estimate import Estimator
from lightning_par.private.torch import is_data_dependent
from lightning_par.runtime.nested import tokens_of
from lightning_par.runtime.precision import Precision
from lightning_par.trace.copying import copy_module


def outlook_of(
    trainer: Any, module: Any, data: Any, cluster: Cluster, batch: int | None, say: Say, layout: Layout | None = None
) -> tuple[Outlook, int | None]:
    """Search the layouts of a run. One process; nothing is trained, and the module is not changed.

    Args:
        trainer: a Trainer of one process, with a `HybridParallelStrategy`.
        module: the user's.
        data: its data.
        cluster: where it is to run.
        batch: samples of a step over all replicas; by default those of the module's first batch.
        say: told what is being done.
        layout: whose place among the others is asked for.

    Returns:
        What was found, and the tokens of a sample; None where samples have none.

    Raises:
        ConfigurationError: the module, its batch or its optimizer cannot be planned for, or nothing fits.
    """
    with taken_apart(trainer, say, module, data) as (anatomy, first):
        found = search(anatomy, cluster, batch or batch_size(first))
        if layout is not None:
            found = replace(found, asked=judge(Estimator(anatomy, cluster), found, layout))
        return found, tokens_of(first)


@contextmanager
def taken_apart(trainer: Any, say: Say, *args: Any, **kwargs: Any) -> Iterator[tuple[Anatomy, Any]]:
    """The module of a training as the planner sees it, and its first batch. One process; the module is not changed.

    Args:
        trainer: a Trainer with a `HybridParallelStrategy`.
        say: told what is being done.
        *args, **kwargs: what its ``fit`` was called with; the module first, then its data.

    Raises:
        ConfigurationError: the module, its batch or its optimizer cannot be planned for; also where the block finds it.
    """
    with rehearsed(trainer, "fit", *args, **kwargs) as (twin, first, optimizers), values_unknown(twin):
        yield Subject.of(twin, first, optimizers, trainer.strategy).take_apart(say), first


@dataclass(frozen=True)
class Subject:
    """What the planner looks at.

    Attributes:
        module: a copy of the user's.
        pieces: a few samples of its first batch, for each number of `ROWS`.
        form: what its optimizer keeps.
        precision: of the run.
        overrides: the user's plan section.
        samples: in that batch.
    """

    module: nn.Module
    pieces: tuple[Any, Any]
    form: OptimizerForm
    precision: Precision
    overrides: Mapping[str, Any]
    samples: int

    @classmethod
    def of(cls, twin: Any, first: Any, optimizers: Sequence[Any] | None, strategy: Any) -> Subject:
        """From what `rehearsed` yields.

        Raises:
            ConfigurationError: the batch has no samples, or the optimizer cannot be planned for.
        """
        form = read_optimizer(optimizers[0], dict(twin.named_parameters())) if optimizers and len(optimizers) == 1 else None
        if form is None:
            names = ", ".join(type(each).__name__ for each in optimizers or ()) or "none before the training"
            raise ModelError(
                f"the planner takes one optimizer that keeps so much for each element, and {type(twin).__name__}."
                f"configure_optimizers gives {names}: plan with AdamW"
            )
        few, more = (repeat_samples(first, count) for count in ROWS)
        return cls(twin, (few, more), form, strategy.precision, strategy.options.overrides, batch_size(first))

    def take_apart(self, say: Say) -> Anatomy:
        """As far as it is asked.

        Raises:
            ConfigurationError: the module cannot be planned for.
        """
        return Anatomy(self.module, self.pieces, loss_of, self.form, self.precision, self.overrides, say)

    def without_weights(self) -> Subject:
        """To keep: of parameters only addresses are taken, no memory as long as nobody writes there."""

        def empty(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter):
                return tensor
            untouched = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")  # deferred ones, too
            return nn.Parameter(untouched, requires_grad=tensor.requires_grad)

        return replace(self, module=copy_module(self.module, empty, by_reference=[self.module.__dict__.get("_trainer")]))


@contextmanager
def values_unknown(module: Any) -> Iterator[None]:
    """Inside the planner runs a module dry.

    Raises:
        ModelError: its step needs values of tensors.
    """
    try:
        yield
    except Exception as error:
        if not is_data_dependent(error):
            raise
        raise ModelError(
            f"{type(module).__name__}.training_step needs values of tensors, which a dry run does not have: the planner cannot "
            "time it"
        ) from error
