"""What a user may choose about ZeRO, and what of it a layout can have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_par.errors import ConfigurationError
from lightning_par.layout import Layout

STEP, MICROBATCH = "step", "microbatch"
CPU, NVME = "cpu", "nvme"
# what says the same as another option of the run, with where that is said
_ELSEWHERE = {
    "zero_optimization.stage": "the layout word, such as zero2",
    "gradient_accumulation_steps": "Trainer(accumulate_grad_batches=...)",
    "train_batch_size": "your dataloader",
    "train_micro_batch_size_per_gpu": "your dataloader",
    "gradient_clipping": "Trainer(gradient_clip_val=...)",
    "optimizer": "configure_optimizers",
    "scheduler": "configure_optimizers",
    "fp16": "Trainer(precision=...)",
    "bf16": "Trainer(precision=...)",
    "torch_autocast": "Trainer(precision=...)",
    "tensor_parallel": "the layout word, such as tp2",
    "zero_optimization.offload_optimizer.device": "zero.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "zero.nvme_path",
    "zero_optimization.offload_param.device": "zero.offload_param",
    "zero_optimization.offload_param.nvme_path": "zero.nvme_path",
}


@dataclass(frozen=True)
class ZeroOptions:
    """The section ``zero``.

    Attributes:
        reduce: when gradients go to the dp rank that keeps them: ``step``, once for all microbatches, or ``microbatch``, each as
            soon as a backward has made it, which keeps 1/dp of them and sends them as often as there are microbatches.
        offload_optimizer: ``cpu`` keeps masters and optimizer states in the host's memory, and steps there; ``nvme`` in files, and
            loads them group by group to step.
        nvme_path: an existing folder for these files, on a disk of each host. Each run has folders of its own there.
        offload_param: ``cpu`` keeps the parameters that stage 3 partitions in the host's memory.
        hpz_partition_size: ranks that hold a second partition of the parameters among them (ZeRO++, arXiv 2306.10209).
        quantized_weights: whether stage 3 gathers parameters in 8 bits (ZeRO++).
        quantized_gradients: whether stage 3 reduces gradients over nodes in 4 bits (ZeRO++).
        config: any other option of DeepSpeed, as its JSON has it; wins over all.
    """

    reduce: str = STEP
    offload_optimizer: str | None = None
    nvme_path: str | None = None
    offload_param: str | None = None
    hpz_partition_size: int = 1
    quantized_weights: bool = False
    quantized_gradients: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_in_files(self) -> bool:
        """Whether optimizer states are in files."""
        return self.offload_optimizer == NVME


def partitions_late(layout: Layout, options: ZeroOptions) -> bool:
    """Whether parameters may get their memory one after the other, as stage 3 partitions them.

    ZeRO++ makes groups of its own first.
    """
    plain = options.hpz_partition_size == 1 and not options.quantized_weights and not options.config
    return layout.zero == 3 and (layout.dp or 1) > 1 and plain


def read_zero_options(given: Mapping[str, Any] | None) -> ZeroOptions:
    """The options in a user's section ``zero``; a value of None is the default.

    Raises:
        ConfigurationError: an unknown key, or a value that the key does not take.
    """
    known = [each.name for each in fields(ZeroOptions)]
    for key in given or {}:
        if key not in known:
            raise ConfigurationError(f"zero.{key}: there is no such option; there are {', '.join(known)}; all else is zero.config")
    options = ZeroOptions(**{key: value for key, value in (given or {}).items() if value is not None})
    if options.reduce not in (STEP, MICROBATCH):
        raise ConfigurationError(f"zero.reduce={options.reduce}: it is {STEP} or {MICROBATCH}")
    if options.offload_optimizer not in (None, CPU, NVME):
        raise ConfigurationError(
            f"zero.offload_optimizer={options.offload_optimizer}: it is {CPU} or {NVME}, or null for the device that trains"
        )
    if options.offload_param == NVME:
        raise ConfigurationError(
            f"zero.offload_param={NVME}: DeepSpeed has a fixed number of buffers for parameters from files that are gathered, "
            f"and a stage of a pipeline has some gathered until the step: use {CPU}"
        )
    if options.offload_param not in (None, CPU):
        raise ConfigurationError(f"zero.offload_param={options.offload_param}: it is {CPU}, or null for the device that trains")
    if options.is_in_files and options.nvme_path is None:
        raise ConfigurationError(f"zero.offload_optimizer={NVME}: say where its files go: zero.nvme_path=FOLDER")
    if options.nvme_path is not None and not options.is_in_files:
        raise ConfigurationError(
            f"zero.nvme_path={options.nvme_path}: nothing would go there: use zero.offload_optimizer={NVME}, or leave it out"
        )
    size = options.hpz_partition_size
    if not isinstance(size, int) or size < 1:
        raise ConfigurationError(f"zero.hpz_partition_size={size}: it is a number of ranks, 1 for no second partition")
    for name in ("quantized_weights", "quantized_gradients"):
        if not isinstance(getattr(options, name), bool):
            raise ConfigurationError(f"zero.{name}={getattr(options, name)}: it is true or false")
    if not isinstance(options.config, Mapping):
        raise ConfigurationError(f"zero.config={options.config}: it is a mapping, as DeepSpeed's JSON")
    for path in flat(options.config):
        for own, place in _ELSEWHERE.items():
            if path == own or path.startswith(f"{own}."):
                raise ConfigurationError(f"zero.config.{path}: this is said by {place}: leave it out here")
    return options


def check_zero_options(options: ZeroOptions, layout: Layout, schedule: str, splits_backward: bool) -> None:
    """Check that the options are some that a layout can have.

    Args:
        options: as the user typed them.
        layout: as the user typed it.
        schedule: of the pipeline.
        splits_backward: whether that computes weight gradients apart from input gradients.

    Raises:
        ConfigurationError: names the option, the rule and what would work.
    """
    stage, chosen = layout.zero, _chosen(options)
    for name, least in _LEAST_STAGE.items():
        if name in chosen and stage < least:
            stages = "1, 2 and 3" if least == 1 else "2 and 3" if least == 2 else "3"
            raise ConfigurationError(f"parallel={layout}: {chosen[name]} is for ZeRO {stages}: use zero{least}, or leave it out")
    if options.is_in_files and stage < 3:
        raise ConfigurationError(
            f"parallel={layout}: {chosen['offload_optimizer']} is for ZeRO 3, the only one of which DeepSpeed keeps files: use "
            f"zero3, or zero.offload_optimizer={CPU}"
        )
    if options.reduce == MICROBATCH and splits_backward:
        raise ConfigurationError(
            f"parallel={layout}: {chosen['reduce']} reduces a gradient when the backward of its layer has made it, and "
            f"schedule={schedule} makes those of weights later: use schedule={'1f1b' if layout.vp == 1 else 'interleaved'}, or "
            f"zero.reduce={STEP}"
        )
    if "hpz_partition_size" in chosen and (layout.tp > 1 or layout.pp > 1):
        raise ConfigurationError(
            f"parallel={layout}: {chosen['hpz_partition_size']} needs groups of consecutive ranks that are all replicas, as "
            "DeepSpeed makes them, and tp or pp lie between: use a layout of dp alone, or leave it out"
        )


_UNFORESEEN = ("hpz_partition_size", "quantized_weights", "quantized_gradients", "config")
_LEAST_STAGE = {
    "reduce": 2,  # in stage 1 every rank keeps whole gradients
    "offload_optimizer": 1,
    "offload_param": 3,
    "hpz_partition_size": 3,
    "quantized_weights": 3,
    "quantized_gradients": 3,
    "config": 1,
}


def unforeseen(options: ZeroOptions) -> list[str]:
    """What of the options, as the user typed it, changes what a rank stores in a way that no formula here has."""
    return [typed for name, typed in _chosen(options).items() if name in _UNFORESEEN]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a nested mapping by dotted path, such as ``zero_optimization.sub_group_size``."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return values


def _chosen(options: ZeroOptions) -> dict[str, str]:
    """What differs from the defaults, as the user typed it."""
    standard = ZeroOptions()
    different = [each.name for each in fields(ZeroOptions) if getattr(options, each.name) != getattr(standard, each.name)]
    return {name: f"zero.{name}" if name == "config" else f"zero.{name}={_typed(getattr(options, name))}" for name in different}


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
