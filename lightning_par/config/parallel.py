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

    tp: int = 1
    pp: int = 1
    vp: int = 1
    dp: int | None = None
    zero: int = 0
    microbatches: int | None = None
    sp: bool = False
    recompute: str = "none"
    memory_gib: float | None = None
    offload_activations: bool = False
    compile: Any = False  # true, or the name of a backend
    fp8: str | None = None
    auto: bool = False

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
