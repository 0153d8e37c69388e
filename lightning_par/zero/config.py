"""DeepSpeed's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from lightning_par.errors import ConfigurationError
from lightning_par.zero.option import ZeroOptions, flat

BUCKET_ELEMENTS = 50_000_000  # 200 MB of fp32; DeepSpeed's default is ten times that, allocated at every step


def deepspeed_config(
    stage: int,
    num_elements: int,
    options: ZeroOptions,
    device: torch.device,
    has_masters: bool = False,
    files: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The configuration of an engine; whatever has a default that changes the result or has changed is stated.

    Args:
        stage: 1, 2 or 3.
        num_elements: of the parameters that this rank trains.
        options: the user's; ``config`` is merged last.
        device: where the parameters are.
        has_masters: whether they are bfloat16.
        files: what ``offload_optimizer=nvme`` adds.

    Raises:
        ConfigurationError: an option that the device has not.
    """
    config = _config(stage, num_elements, options, device)
    config = _merged(_with_masters(config) if has_masters else config, files)
    return _merged(config, options.config)


def overwritten(stage: int, options: ZeroOptions) -> list[str]:
    """One line for each value of ``options.config`` that takes the place of one that is set here."""
    ours = flat(_config(stage, 1, ZeroOptions(), torch.device("cpu")))
    return [
        f"zero.config.{path}={value} takes the place of {ours[path]}, which is set for a reason: see lightning_par/zero/config.py"
        for path, value in flat(options.config).items()
        if path in ours and ours[path] != value
    ]


def _config(stage: int, num_elements: int, options: ZeroOptions, device: torch.device) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the default became 1.0 in 2026
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {**_zero(stage, num_elements), **_offload(options, device), **_plus_plus(options, device)},
    }


def _with_masters(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration for bfloat16 parameters with float32 masters, gradients (`accumulate_in_float32`) and messages.

    With stage 1 DeepSpeed would take an optimizer of its own for this, which cannot reduce once for all microbatches; stage 2
    gives the same numbers, and frees the gradients of other ranks besides. Contiguous gradients would be rounded to bfloat16.
    """
    zero = config["zero_optimization"]
    return {
        **config,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {**zero, "stage": max(2, zero["stage"]), "contiguous_gradients": False},
    }


def _zero(stage: int, num_elements: int) -> dict[str, Any]:
    bucket = 2 * max(1, min(BUCKET_ELEMENTS, num_elements + 1) // 2)  # must be even
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": False,  # DeepSpeed's own map from parameters to fragments is wrong with it
        "memory_efficient_linear": False,  # it replaces torch.nn.functional.linear for the whole process
        "use_multi_rank_bucket_allreduce": False,  # stages 1 and 2 would send half as much again
    }
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # small parameters travel with the large ones of their module
        zero["contiguous_gradients"] = False  # a bucket's copy that its reduction copies once more
    else:
        zero["compute_grad_norm"] = False  # one collective per parameter group: stages with different numbers hang
    return zero


def _offload(options: ZeroOptions, device: torch.device) -> dict[str, Any]:
    is_pinned = device.type != "cpu"  # pinned memory is for copies to a device
    chosen = {name: getattr(options, name) for name in ("offload_optimizer", "offload_param")}
    offload: dict[str, Any] = {name: {"device": to, "pin_memory": is_pinned} for name, to in chosen.items() if to is not None}
    if options.offload_optimizer is not None:
        offload["compute_grad_norm"] = True  # DeepSpeed asks for it here; its collectives are left out in private/deepspeed
    return offload


def _plus_plus(options: ZeroOptions, device: torch.device) -> dict[str, Any]:
    """ZeRO++."""
    quantized = {f"zero_{name}": True for name in ("quantized_weights", "quantized_gradients") if getattr(options, name)}
    if quantized and device.type != "cuda":
        name = next(iter(quantized)).removeprefix("zero_")
        raise ConfigurationError(
            f"zero.{name}=true: DeepSpeed quantises on CUDA devices only, and this is {device.type}: leave it out"
        )
    if options.hpz_partition_size > 1:
        return {**quantized, "zero_hpz_partition_size": options.hpz_partition_size}
    return quantized


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """``theirs`` over ``ours``, section by section."""
    merged = dict(ours)
    for key, value in theirs.items():
        held = merged.get(key)
        merged[key] = _merged(held, value) if isinstance(held, Mapping) and isinstance(value, Mapping) else value
    return merged
