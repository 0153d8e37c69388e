"""A search for layouts from a Trainer's module and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_par.errors import DataError, ModelError
from lightning_par.host.batch import batch_size, first_samples
from lightning_par.host.loss import loss_of
from lightning_par.host.preflight import rehearsed
from lightning_par.memory import read_optimizer
from lightning_par.planner import Anatomy, Cluster, Outlook, search
from lightning_par.planner.anatomy import ROWS
from lightning_par.private.torch import is_data_dependent
from lightning_par.runtime.nested import tensors_in


def outlook_of(
    trainer: Any, module: Any, data: Any, cluster: Cluster, batch: int | None, say: Callable[[str], None]
) -> tuple[Outlook, int | None]:
    """Search the layouts of a run. One process; nothing is trained, and the module is not changed.

    Args:
        trainer: a Trainer of one process, with a `HybridParallelStrategy`.
        module: the user's.
        data: its data.
        cluster: where it is to run.
        batch: samples of a step over all replicas; by default those of the module's first batch.
        say: told what is being done.

    Returns:
        What was found, and the tokens of a sample; None where samples have none.

    Raises:
        ConfigurationError: the module, its batch or its optimizer cannot be planned for, or nothing fits.
    """
    with taken_apart(trainer, module, data, say) as (anatomy, first):
        return search(anatomy, cluster, batch or batch_size(first)), _tokens(first)


@contextmanager
def taken_apart(trainer: Any, module: Any, data: Any, say: Callable[[str], None]) -> Iterator[tuple[Anatomy, Any]]:
    """The module of a run, to be taken apart inside, and its first batch.

    Args:
        trainer, module, data, say: as for `outlook_of`.

    Raises:
        ConfigurationError: the module, its batch or its optimizer cannot be planned for.
    """
    strategy = trainer.strategy
    with rehearsed(trainer, "fit", module, data) as (twin, first, optimizers):
        size = batch_size(first)
        if size <= max(ROWS):
            raise DataError(
                f"a batch of {size} samples: plan looks at {ROWS[0]} and at {ROWS[1]} of them, so give it at least {ROWS[1] + 1}"
            )
        form = read_optimizer(optimizers[0], dict(twin.named_parameters())) if optimizers and len(optimizers) == 1 else None
        if form is None:
            names = ", ".join(type(each).__name__ for each in optimizers or ()) or "none before the training"
            raise ModelError(
                "plan takes one optimizer that keeps so much for each element, and "
                f"{type(module).__name__}.configure_optimizers gives {names}: plan with AdamW"
            )
        pieces = first_samples(first, ROWS[0]), first_samples(first, ROWS[1])
        try:
            yield Anatomy(twin, pieces, loss_of, form, strategy.precision, strategy.options.overrides, say), first
        except Exception as error:
            if not is_data_dependent(error):
                raise
            raise ModelError(
                f"{type(module).__name__}.training_step needs values of tensors, which a dry run does not have: plan cannot time it"
            ) from error


def _tokens(batch: Any) -> int | None:
    """Tokens of a sample: the second dim of the first tensor of whole numbers that has one."""
    whole = (
        tensor for tensor in tensors_in(batch) if tensor.ndim > 1 and not tensor.is_floating_point() and tensor.dtype != torch.bool
    )
    return next((tensor.shape[1] for tensor in whole), None)
