"""The config group ``parallel``: the schema of its fields and the way from them to a `Layout` and a strategy's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_par.errors import LayoutError
from lightning_par.layout import Layout


@dataclass
class ParallelConfig:
    """Fields of ``parallel``: those of `Layout`, under its names, and options of the strategy.

    Not `Layout` itself: OmegaConf refuses frozen dataclasses.

    Types are checked when Hydra composes; ranges and what depends on the devices by `Layout`.
    """

    tp: int = 1  # ranks that share every split layer
    pp: int = 1  # ranks that share the stages of a pipeline
    vp: int = 1  # stages on each of these ranks
    dp: int | None = None  # replicas; null: what is left of the devices
    zero: int = 0  # what is sharded over dp: 0 nothing, 1 optimizer states, 2 also gradients, 3 also parameters
    microbatches: int | None = None  # that a replica's batch is cut into; null: twice the stages, or what divides the batch
    sp: bool = False  # hidden states between the blocks are cut along the sequence, over the tp ranks
    recompute: str = "none"  # what of the blocks the backward computes again: none, selective, full or auto
    memory_gib: float | None = None  # that each rank may store; checked before the run, and what recompute=auto fits
    offload_activations: bool = False  # what the backward needs waits in the memory of the host
    compile: Any = False  # the blocks, by torch.compile: true, or the name of a backend
    fp8: str | None = None  # linear layers of the blocks multiply in float8, scaled tensorwise or rowwise
    auto: bool = False  # the planner chooses the layout

    @classmethod
    def of(cls, layout: Layout) -> ParallelConfig:
        """The fields of a layout word. Where stages lie (`Layout.placement`) is no field: it follows from the schedule."""
        return cls(**{field.name: getattr(layout, field.name) for field in fields(cls) if hasattr(layout, field.name)})


def read_layout(parallel: Mapping[str, Any]) -> Layout:
    """The layout that the composed group asks for.

    Args:
        parallel: ``config.parallel``. Keys are checked here once more, because ``+parallel.tpp=3`` and a YAML file without
            the schema get past Hydra.

    Raises:
        LayoutError: an unknown key or a value out of range.
    """
    known = [field.name for field in fields(ParallelConfig)]
    for key in parallel:
        if key not in known:
            raise LayoutError(f"parallel.{key}: there is no such key; the keys are {', '.join(known)}")
    return Layout(**{field.name: parallel[field.name] for field in fields(Layout) if field.name in parallel})


def read_arguments(parallel: Mapping[str, Any]) -> dict[str, Any]:
    """What the composed group says beside the layout, by the strategy's names of it. Keys are known ones, by `read_layout`."""
    sizes = {field.name for field in fields(Layout)}
    return {field.name: parallel[field.name] for field in fields(ParallelConfig) if field.name in parallel.keys() - sizes}
