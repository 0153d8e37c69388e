"""The check itself: the user's run set up once, trained in one process and in its layout, and compared."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_par.layout import Layout
from lightning_par.parity.compare import Comparison, check_can_compare, compare_runs
from lightning_par.parity.processes import run_forked
from lightning_par.parity.run import RankRun, Run, read_run, train_alone, train_rank
from lightning_par.parity.subject import Subject, prepare_subject
from lightning_par.private.deepspeed import import_deepspeed

# What a Trainer of the check is told, whatever the user's is: few steps, in float32, on this machine, and nothing is written.
TRAINER_OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "num_nodes": 1,
    "precision": "32-true",
    "accumulate_grad_batches": 1,
    "min_steps": None,
    "max_time": None,
    "limit_train_batches": 1.0,
    "limit_val_batches": 0,
    "val_check_interval": 1.0,
    "num_sanity_val_steps": 0,
    "overfit_batches": 0.0,
    "fast_dev_run": False,
    "use_distributed_sampler": False,
    "profiler": None,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
# And its strategy: what changes no number is left out, and so is float8, which needs a GPU.
STRATEGY_OPTIONS: dict[str, Any] = {
    "compile": False,
    "fp8": None,
    "detect_anomaly": None,
    "drift_guard": 0,
    "hang_seconds": None,
    "async_save": False,
    "max_restarts": 0,
    "print_plan": False,
}
BuildTrainer = Callable[..., Any]
_ALONE = "alone"  # the file of the run in one process


@dataclass(frozen=True)
class Report:
    """What the check has found.

    Attributes:
        module: name of its class.
        layout: that was checked.
        size: how much of the module was.
        samples: of a batch of all replicas together.
        has_dropped: whether dropout was turned off.
        comparison: all numbers.
    """

    module: str
    layout: Layout
    size: str
    samples: int
    has_dropped: bool
    comparison: Comparison


def check_parity(
    trainer: Any,
    module: Any,
    data: Any,
    build_trainer: BuildTrainer,
    num_steps: int,
    tolerance: float,
    is_full: bool,
    tell: Callable[[str], None],
) -> Report:
    """Train the user's module in one process and in a layout, and compare losses, gradients and weights.

    Args:
        trainer: the user's, with the layout.
        module, data: what its ``fit`` would get; used up.
        build_trainer: makes another one, given a `Layout` and options; called in the processes that train.
        num_steps: how many optimizer steps.
        tolerance: relative.
        is_full: whether a large module is checked as large as it is.
        tell: is told what goes on.

    Raises:
        ConfigurationError: the layout cannot work, or nothing can be compared.
        ProcessError: a process has failed.
    """
    torch.set_num_threads(1)  # threads of a parallel region would be lost in the processes that are forked
    tell("setting up the module, its data and the plan")
    subject, root = prepare_subject(trainer, module, data, num_steps, is_full), trainer.strategy.root
    layout, build, name = subject.layout, partial(build_trainer, subject.layout), type(module).__name__
    with tempfile.TemporaryDirectory(prefix="lightning_par-check-") as folder:
        tell(f"training in one process: {subject.size}")
        alone, moved, reseeded = _train_alone(build, root, subject, Path(folder))
        check_can_compare(alone, moved, reseeded, tolerance, name)
        tell(f"training in {layout}, ranks: {layout.world_size}")
        comparison = compare_runs(alone, moved, _train_ranks(build, root, subject, Path(folder)), tolerance)
    return Report(name, layout, subject.size, subject.samples, alone.has_dropped, comparison)


def _train_alone(build: BuildTrainer, root: str, subject: Subject, folder: Path) -> list[Run]:
    """The run in one process; the same from weights that one rounding has moved; and its first step with another seed."""
    run = partial(train_alone, partial(build, plugins=_environment(root)), root)
    first, seed = replace(subject, batches=subject.batches[:1]), torch.initial_seed()
    files = [folder / _ALONE, folder / "moved", folder / "reseeded"]
    run_forked(
        [
            partial(run, subject, files[0], seed),
            partial(run, subject, files[1], seed, is_moved=True),
            partial(run, first, files[2], seed + 1),
        ],
        [f"{type(subject.module).__name__} in one process"] * 3,
    )
    return [read_run(file) for file in files]


def _train_ranks(build: BuildTrainer, root: str, subject: Subject, folder: Path) -> list[RankRun]:
    """The run in the layout, beside that which is in the folder."""
    layout = subject.layout
    if layout.zero and layout.dp != 1:
        import_deepspeed(torch.device("cpu"))  # once, as it takes each rank seconds
    ranks = range(layout.world_size)
    return run_forked(
        [partial(_as_rank, rank, layout, build, root, subject, folder) for rank in ranks],
        [f"rank {rank} ({layout.coordinate_of(rank)}) of {layout}" for rank in ranks],
    )


def _as_rank(rank: int, layout: Layout, build: BuildTrainer, root: str, subject: Subject, folder: Path) -> RankRun:
    """Be a rank for Lightning, as if it had been started as one."""
    world = str(layout.world_size)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    whole = {"init": "constructor", "weights": None}  # the module comes with its weights in memory
    options = {"devices": layout.world_size, "plugins": _environment(root), "strategy_options": {**STRATEGY_OPTIONS, **whole}}
    return train_rank(partial(build, **options), root, subject, folder / _ALONE, rank, folder)


def _environment(root: str) -> list[Any]:
    """One machine, whatever SLURM or torchrun say of the process that was started."""
    return [import_module(f"{root}.plugins.environments").LightningEnvironment()]
