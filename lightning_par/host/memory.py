"""What ranks are going to store, foreseen before they are started; ``recompute: auto``, and ``memory_gib`` that must suffice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_par.engine import traced_costs
from lightning_par.errors import ConfigurationError, ModelError
from lightning_par.host.batch import split_batch
from lightning_par.host.loss import loss_of
from lightning_par.layout import Layout
from lightning_par.memory import fit_recompute, forecast, read_optimizer
from lightning_par.pipeline.tables import Tables, splits_backward
from lightning_par.plan import Overrides, Plan
from lightning_par.plan.memory import RankMemory
from lightning_par.private.torch import is_data_dependent
from lightning_par.runtime.precision import FULL, Precision
from lightning_par.zero.option import ZeroOptions, unforeseen

_SAY = "say recompute=none, selective or full"


class Foresight:
    """Knows what the ranks of a plan store. One process.

    Args:
        module: a copy of the user's module.
        batch: of one replica.
        optimizers: of the module; None where they are not known.
        schedule: of the pipeline.
        precision: of the run.
        options: the section ``zero``.

    Raises:
        ModelError: what the optimizer keeps cannot be found out, or an option has it store more.
    """

    def __init__(
        self,
        module: Any,
        batch: Any,
        optimizers: Sequence[Any] | None,
        schedule: str,
        precision: Precision = FULL,
        options: ZeroOptions | None = None,
    ) -> None:
        self._module, self._batch, self._schedule, self._precision = module, batch, schedule, precision
        self._options = options or ZeroOptions()
        if chosen := unforeseen(self._options):
            raise ModelError(
                f"the memory of the ranks cannot be foreseen with {', '.join(chosen)}: {_SAY} and leave out memory_gib"
            )
        forms = [read_optimizer(each, dict(module.named_parameters())) for each in optimizers or ()]
        if len(forms) != 1 or forms[0] is None:
            names = ", ".join(type(each).__name__ for each in optimizers or ()) or "none before the training"
            raise ModelError(
                "the memory of the ranks cannot be foreseen: it takes one optimizer that keeps so much for each element, and "
                f"{type(module).__name__}.configure_optimizers gives {names}: {_SAY} and leave out memory_gib"
            )
        self._form = forms[0]

    def __call__(self, plan: Plan) -> tuple[RankMemory, ...]:
        """What each pp coordinate stores.

        Raises:
            ModelError: the step needs values of tensors.
        """
        count = plan.layout.microbatches or 1
        piece = split_batch(self._batch, count)[0][0]
        table = Tables(self._schedule, plan.layout, traced_costs(plan)).training(count)
        splits = splits_backward(self._schedule, plan.layout)
        try:
            return forecast(self._module, piece, plan, table, self._form, loss_of, splits, self._precision, self._options)
        except Exception as error:
            if not is_data_dependent(error):
                raise
            raise ModelError(
                f"the memory of the ranks cannot be foreseen: {type(self._module).__name__}.training_step needs values of "
                f"tensors, which the dry run does not have: {_SAY} and leave out memory_gib"
            ) from error


def check_memory_gib(memory_gib: float | None) -> float | None:
    """Check a number of GiB.

    Raises:
        ConfigurationError: it is not positive.
    """
    if memory_gib is not None and not 0 < memory_gib < math.inf:
        raise ConfigurationError(f"memory_gib={memory_gib:g}: it is what each rank may store, and must be positive")
    return memory_gib


def memory_budget(memory_gib: float | None, device: torch.device, overrides: Mapping[str, Any]) -> int | None:
    """Bytes that each rank may store; None where nobody asks.

    Raises:
        ConfigurationError: ``auto`` on a CPU, whose memory all ranks share, and no ``memory_gib``.
    """
    if memory_gib is not None:
        return int(memory_gib * 2**30)
    if "auto" not in (overrides.get("recompute") or {}).values():
        return None
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    raise ConfigurationError(
        "recompute=auto fits what a rank stores to the memory of its device, and ranks share a CPU's: say how many GiB each of "
        "them may have, such as memory_gib=4"
    )


def fit_memory(plan: Plan, asked: Layout, budget: int, overrides: Mapping[str, Any], foresee: Foresight) -> Plan:
    """The plan with its memory, and with as few blocks recomputed as fit the budget, where it was left open.

    Raises:
        ModelError: it does not fit.
    """
    blocks = () if plan.chain is None else plan.chain.blocks
    words = Overrides.parse(overrides).recomputed(blocks) if blocks else {}
    left_open = [index for index, path in enumerate(blocks) if words.get(path) == "auto"]
    return fit_recompute(plan, left_open, budget, foresee, asked)


def with_memory(plan: Plan, foresee: Foresight) -> Plan:
    """The plan with its memory."""
    return replace(plan, memory=foresee(plan))
