"""What a strategy was told beside its layout and schedule, read and checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_par.errors import ConfigurationError
from lightning_par.host.loss_weight import TargetCount
from lightning_par.plan.compiled import read_backend
from lightning_par.plan.override import check_float8_word, check_recompute_word
from lightning_par.zero.option import ZeroOptions


@dataclass(frozen=True)
class Options:
    """What `HybridParallelStrategy` was told, as the parts that do the work take it.

    Attributes:
        overrides: the user's plan section, with what other arguments say of blocks in it.
        zero: options of ZeRO.
        loss_weight: what counts the targets of a batch; None where its samples count.
        memory_gib: what each rank may store; None where nobody says.
        init: how weights are made, one of `lightning_par.host.construction.INIT_WORDS`.
        weights: where weights are read from; None where they are made.
        async_save: whether checkpoints are written in the background.
        hang_seconds: how long an action may stand still; None for any time.
        print_plan: whether the plan is printed.
        detects_anomaly: whether a loss that is not finite ends the run.
        drift_guard: after how many steps the ranks compare what they hold; 0 for never.
        max_restarts: how often ranks are started again.
        audit: whether trainings are compared with their forecast.
        monitor: whether trainings are measured.
    """

    overrides: Mapping[str, Any]
    zero: ZeroOptions
    loss_weight: TargetCount | None
    memory_gib: float | None
    init: str
    weights: str | Path | None
    async_save: bool
    hang_seconds: float | None
    print_plan: bool
    detects_anomaly: bool
    drift_guard: int
    max_restarts: int
    audit: bool
    monitor: bool


def check_max_restarts(max_restarts: int) -> int:
    """Check a number of restarts.

    Raises:
        ConfigurationError: it is none.
    """
    if not isinstance(max_restarts, int) or max_restarts < 0:
        raise ConfigurationError(f"max_restarts={max_restarts!r}: how often ranks are started again: use 0, 1, 2 and so on")
    return max_restarts


def read_overrides(
    plan: Mapping[str, Any] | None, recompute: str, offload_activations: bool, compile: bool | str, fp8: str | None
) -> dict[str, Any]:
    """The user's plan section, with what other arguments say of all blocks in it; what it says of single blocks wins.

    Args:
        plan, recompute, offload_activations, compile, fp8: as `HybridParallelStrategy` takes them.

    Raises:
        ConfigurationError: a word that is unknown.
    """
    check_recompute_word(recompute)
    overrides = dict(plan or {})
    if compile:
        overrides["compile"] = read_backend(compile)
    if fp8 is not None:
        check_float8_word(fp8)
        overrides["fp8"] = fp8
    if recompute != "none":
        overrides["recompute"] = {"*": recompute, **(overrides.get("recompute") or {})}
    if offload_activations:
        overrides["offload_activations"] = {"*": True, **(overrides.get("offload_activations") or {})}
    return overrides


def check_drift_guard(every: int) -> int:
    """Check a number of steps.

    Raises:
        ConfigurationError: it is none.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise ConfigurationError(f"drift_guard={every}: ranks compare what they hold every so many steps: use 100, or 0 for never")
    return every
