"""A DeepSpeed engine started, in silence. DeepSpeed is imported here and not before: a run without ZeRO never loads it."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_par.private.deepspeed.engine import ZeroEngine
from lightning_par.private.deepspeed.mark import Marks, remember_parameters
from lightning_par.private.deepspeed.stage3 import ZeroEngine3
from lightning_par.private.deepspeed.stage12 import ZeroEngine12
from lightning_par.private.deepspeed.version import check_deepspeed, require, wrong_version


def start_zero_engine(
    stage: int,
    root: nn.Module,
    optimizer: Optimizer,
    mpu: object,
    config: dict[str, Any],
    device: torch.device,
    units: Iterable[nn.Module] = (),
    fill: Callable[[nn.Parameter], None] | None = None,
) -> ZeroEngine:
    """Build DeepSpeed's engine for ZeRO stage 1, 2 or 3. Collective over the world.

    Args:
        stage: ZeRO stage.
        root: holds the parameters (stage 3: the modules too). Its own ``forward`` must never be called: DeepSpeed
            broadcasts over the world there.
        optimizer: a torch optimizer that DeepSpeed may take apart.
        mpu: what DeepSpeed asks about the ranks.
        config: DeepSpeed's configuration.
        device: where the parameters are.
        units: in stage 3, modules inside ``root`` whose parameters are gathered all at once.
        fill: in stage 3, gives a parameter its memory, just before it is partitioned; None where all have it.

    Raises:
        ConfigurationError: DeepSpeed is missing or another version.
    """
    deepspeed = import_deepspeed(device)
    marks = Marks(root)
    for unit in units if stage == 3 else ():
        deepspeed.utils.set_z3_leaf_module(unit, True)
        remember_parameters(unit)
    if stage == 3 and fill is not None:
        _partition(root, mpu, config, fill)
    engine, *_ = deepspeed.initialize(model=root, optimizer=optimizer, mpu=mpu, config=config)
    marks.find()
    kind = ZeroEngine3 if stage == 3 else ZeroEngine12
    try:
        require(engine.optimizer, kind.NAMES)
    except AttributeError as error:
        raise wrong_version(error) from error
    return kind(engine, marks)


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, in silence.

    Raises:
        ConfigurationError: it is missing or another version.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it guesses, with a warning
    check_deepspeed()
    quieten_deepspeed(device)
    return importlib.import_module("deepspeed")


def _partition(root: nn.Module, mpu: Any, config: dict[str, Any], fill: Callable[[nn.Parameter], None]) -> None:
    """Partition one parameter after the other, as DeepSpeed itself does with a module whose parameters all have memory.

    Collective over dp.
    """
    partitions = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    init = partitions.Init(data_parallel_group=mpu.get_data_parallel_group(), config_dict_or_path=config, mpu=mpu)
    for parameter in root.parameters():
        fill(parameter)
        init._zero_init_param(parameter)


def quieten_deepspeed(device: torch.device) -> None:
    """Keep DeepSpeed, once imported, from compiling, starting programs, and writing to the terminal."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # read when an engine starts on CPU, to decide on building an extension of its own for collectives. Read for the first
    # time, it tries every extension with the C compiler, which writes to stderr; so it must not be read before it is set
    vars(importlib.import_module("deepspeed.ops")).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    if device.type == "cpu":  # the number of devices; else stage 3 starts `numactl` at every reduction to count them
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    warnings.filterwarnings(
        "ignore",
        r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",
        FutureWarning,
        r"torch\.distributed\.",
    )
