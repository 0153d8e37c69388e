"""The ``plan:`` section of a config: lines that win over what the trace says.

plan:
  chain: model.layers                       # the container of the blocks
  stages: [5, 7]                            # blocks on each stage
  split:
    "model.layers.*.mlp.gate_proj": column  # column, row, vocabulary or replicate; * matches any text
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, get_args

from lightning_par.errors import PlanError
from lightning_par.plan.plan import Kind


@dataclass(frozen=True)
class Overrides:
    """What the user's plan section says.

    Attributes:
        chain: path of the container of the blocks.
        stages: number of blocks on each stage.
        split: kind of split by pattern of layer names.
    """

    chain: str | None = None
    stages: tuple[int, ...] | None = None
    split: Mapping[str, Kind] = field(default_factory=dict)

    @classmethod
    def parse(cls, section: Mapping[str, Any] | None) -> Overrides:
        """Read a ``plan:`` section.

        Raises:
            PlanError: an unknown key or kind.
        """
        section = dict(section or {})
        unknown = set(section) - {"chain", "stages", "split"}
        if unknown:
            raise PlanError(f"plan.{min(unknown)}: unknown line; a plan section has chain, stages and split: correct or remove it")
        split = dict(section.get("split") or {})
        for pattern, kind in split.items():
            if kind not in get_args(Kind):
                raise PlanError(f"plan.split={{{pattern}: {kind}}}: a layer is split as one of {', '.join(get_args(Kind))}")
        stages = section.get("stages")
        if stages is not None and not (isinstance(stages, (list, tuple)) and all(isinstance(count, int) for count in stages)):
            raise PlanError(f"plan.stages={stages}: write a list with the number of blocks on each stage, such as [5, 7]")
        return cls(section.get("chain"), None if stages is None else tuple(stages), split)

    def kinds(self, layers: Iterable[str]) -> dict[str, Kind]:
        """The chosen kind of each layer that a pattern names.

        Raises:
            PlanError: a pattern matches no layer.
        """
        names = list(layers)
        chosen: dict[str, Kind] = {}
        for pattern, kind in self.split.items():
            matched = [name for name in names if fnmatchcase(name, pattern)]
            if not matched:
                raise PlanError(
                    f"plan.split={{{pattern}: {kind}}} matches no layer; the module has {_examples(names)}: "
                    "correct the pattern (* matches any text)"
                )
            chosen.update(dict.fromkeys(matched, kind))
        return chosen


def _examples(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "no Linear, Conv1D or Embedding layers"
