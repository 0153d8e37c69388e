"""The version of DeepSpeed that this package was written for, and every private name of it that is relied on, with the reason."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from lightning_par.errors import ConfigurationError

DEEPSPEED_VERSION = "0.19.8"
_REMEDY = f"install deepspeed=={DEEPSPEED_VERSION}, or train without ZeRO (zero0)"

# module, object in it, attributes that must exist on it
_DEEPSPEED_NAMES = (
    # process-wide, and left set by engine.destroy: who is the mpu, and the groups of ZeRO++'s second partition
    ("deepspeed.utils.groups", "mpu", ()),
    ("deepspeed.utils.groups", "_ZERO_PARAM_INTRA_PARALLEL_GROUP", ()),
    # one pass of the reduction over gradients that piled up in p.grad; what engine.coalesce_grad_reduction runs on exit. That
    # context itself is no option: it also runs its collectives while an exception flies through, and the peers hang
    ("deepspeed.runtime.engine", "DeepSpeedEngine", ("_flush_coalesced_reduction_zero12", "_flush_coalesced_reduction_zero3")),
    # stage 1, 2: republish the weights from the masters after a load
    ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer", ("update_lp_params",)),
    # stage 3: its own norm is one collective per parameter group; where a partition begins; the other two republish the weights
    # after a load
    (
        "deepspeed.runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3",
        (
            "_get_norm_groups",
            "_get_param_partition_rank",
            "_partition_all_parameters",
            "_reassign_or_swap_out_partitioned_parameters",
        ),
    ),
    # stage 3: partitions one parameter, which gets its memory just before
    ("deepspeed.runtime.zero.partition_parameters", "Init", ("_zero_init_param",)),
    # stage 3 with states in files: a group in memory and back, outside of a step
    (
        "deepspeed.runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3",
        (
            "_optimizer_states_and_gradient_swap_in",
            "_optimizer_states_and_gradient_swap_out",
            "_swappable_optimizer_subgroup",
        ),
    ),
    ("deepspeed.runtime.swap_tensor.optimizer_utils", "OptimizerSwapper", ("_io_aligned_numel",)),
    # stage 3: the stack of modules whose forward is running, which an exception through a forward leaves behind
    ("deepspeed.runtime.zero.parameter_offload", "FWD_MODULE_STACK", ()),
    ("deepspeed.runtime.zero.parameter_offload", "apply_to_tensors_only", ()),
    ("deepspeed.runtime.zero.parameter_offload", "DeepSpeedZeRoOffload", ("post_sub_module_backward_function",)),
    ("deepspeed.runtime.zero.utils", "apply_to_tensors_only", ()),
    (
        "deepspeed.runtime.zero.partitioned_param_coordinator",
        "PartitionedParameterCoordinator",
        (
            "fetch_sub_module",
            "release_sub_module",
            "release_backward_leftovers",
            "_clean_inflight_param_registry",  # with the next one, for gathering ahead
            "_PartitionedParameterCoordinator__all_gather_params",
        ),
    ),
    # stage 3: a module's own parameters and those it borrows from others
    ("deepspeed.runtime.zero.partitioned_param_coordinator", "iter_params", ()),
)


def check_deepspeed(names: tuple[tuple[str, str, tuple[str, ...]], ...] = _DEEPSPEED_NAMES) -> None:
    """Check that DeepSpeed is there and has every private name that this package uses.

    Args:
        names: module, object in it, attributes of that object.

    Raises:
        ConfigurationError: it is missing or another version; says which one to install.
    """
    try:
        importlib.import_module("deepspeed")
        for module, name, attributes in names:
            require(getattr(importlib.import_module(module), name), attributes)
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"ZeRO stages 1 to 3 need DeepSpeed, and '{error.name}' cannot be imported: {_REMEDY}") from error
    except AttributeError as error:
        raise wrong_version(error) from error


def require(owner: Any, attributes: Iterable[str]) -> None:
    for attribute in attributes:
        getattr(owner, attribute)


def wrong_version(missing: AttributeError) -> ConfigurationError:
    found = importlib.import_module("deepspeed").__version__
    return ConfigurationError(f"DeepSpeed {found} is not the one that ZeRO here was written for ({missing}): {_REMEDY}")
