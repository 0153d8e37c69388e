"""Tensor, pipeline and data parallelism for an unchanged LightningModule.

    Trainer(strategy=HybridParallelStrategy("tp2_pp2_zero1"), devices=8)

The names below are the public surface. The strategy and the callback are imported on first use, so that
`import lightning_par`, the command line's help and Hydra's completion do not wait for torch.

Once this is imported, Lightning reads our checkpoints wherever it reads its own: `load_from_checkpoint`, and a Trainer with another
strategy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_par.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    LayoutError,
    LightningParError,
    ModelError,
    NumericsError,
    PlanError,
    ReplicaError,
)
from lightning_par.layout import Layout, parse_layout
from lightning_par.private.lightning import extend_load

if TYPE_CHECKING:
    from lightning_par.host.monitor import Monitor
    from lightning_par.host.strategy import HybridParallelStrategy
    from lightning_par.host.timeline import PipelineTimeline
    from lightning_par.materialize import deferred_init

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "HybridParallelStrategy",
    "Layout",
    "LayoutError",
    "LightningParError",
    "ModelError",
    "Monitor",
    "NumericsError",
    "PipelineTimeline",
    "PlanError",
    "ReplicaError",
    "__version__",
    "deferred_init",
    "parse_layout",
]


def _load(load: Callable[[], Any], path: Any, map_location: Any, weights_only: bool | None, has_states: bool) -> Any:
    from lightning_par.checkpoint.whole import is_folder, load_folder

    if not is_folder(path):
        return load()
    return load_folder(Path(path), map_location, trust=weights_only is False, has_states=has_states)


extend_load(_load)


def __getattr__(name: str) -> Any:
    if name == "HybridParallelStrategy":
        from lightning_par.host.strategy import HybridParallelStrategy

        return HybridParallelStrategy
    if name == "Monitor":
        from lightning_par.host.monitor import Monitor

        return Monitor
    if name == "PipelineTimeline":
        from lightning_par.host.timeline import PipelineTimeline

        return PipelineTimeline
    if name == "deferred_init":
        from lightning_par.materialize import deferred_init

        return deferred_init
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
