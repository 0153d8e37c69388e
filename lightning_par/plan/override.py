"""The ``plan:`` section of a config: lines that win over what the trace says.

plan:
  chain: model.layers                       # the container of the blocks, or a list: [encoder.block, decoder.block]
  stages: [5, 7]                            # blocks on each stage, of pp x vp
  costs:                                    # seconds of each block, instead of its operations, to cut the chain by
    "model.layers.*": 0.011
    first: 0.002                            # of what is before the blocks
    last: 0.013                             # of what is after them
  split:
    "model.layers.*.mlp.gate_proj": column  # column, row, vocabulary or replicate; * matches any text
  segments:
    "model.layers.*.attn.qkv": [64, 16, 16] # sizes of the fused parts of a column layer's output
  activation:
    "model.layers.*.mlp.gate_proj": global  # local or global, see `lightning_par.plan.plan.LayerPlan`
  recompute:
    "model.layers.*": full                  # none, selective, full, or auto to fit a memory; a later pattern wins
    "model.layers.0": none
  offload_activations:
    "model.layers.*": true                  # what is saved of a block waits on the host; a later pattern wins
  compile: inductor                         # true, or a backend of torch.compile
  fp8: rowwise                              # tensorwise or rowwise: the linear layers of the blocks multiply in float8
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, get_args

from lightning_par.errors import PlanError
from lightning_par.plan.compiled import read_backend
from lightning_par.plan.plan import Activation, Float8Recipe, Kind, Recompute

T = TypeVar("T")
RecomputeWord = Literal[Recompute, "auto"]
RECOMPUTE_WORDS = (*get_args(Recompute), "auto")
_LINES = ("chain", "stages", "costs", "split", "segments", "activation", "recompute", "offload_activations", "compile", "fp8")
_ENDS = ("first", "last")


@dataclass(frozen=True)
class Overrides:
    """What the user's plan section says.

    Attributes:
        chain: path of the container of the blocks, or paths of several.
        stages: number of blocks on each stage.
        costs: seconds by pattern of block names, and for ``first`` and ``last``: what is before and after the blocks.
        split: kind of split, by pattern of layer names.
        segments: sizes of fused parts, by pattern.
        activation: what a column layer gives the user's code, by pattern.
        recompute: what of a block's activations is computed again, by pattern of block names.
        offload_activations: whether what is saved of a block waits on the host, by pattern of block names.
        compile: the backend of torch.compile for the blocks; None leaves them as written.
        fp8: how the linear layers of the blocks scale their operands to multiply in float8; None leaves them as they are.
    """

    chain: str | tuple[str, ...] | None = None
    stages: tuple[int, ...] | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    split: Mapping[str, Kind] = field(default_factory=dict)
    segments: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    activation: Mapping[str, Activation] = field(default_factory=dict)
    recompute: Mapping[str, RecomputeWord] = field(default_factory=dict)
    offload_activations: Mapping[str, bool] = field(default_factory=dict)
    compile: str | None = None
    fp8: Float8Recipe | None = None

    @classmethod
    def parse(cls, section: Mapping[str, Any] | None) -> Overrides:
        """Read a ``plan:`` section.

        Raises:
            PlanError: an unknown line, or a value that the line cannot have.
            ConfigurationError: torch.compile has no such backend.
        """
        section = dict(section or {})
        unknown = set(section) - set(_LINES)
        if unknown:
            raise PlanError(f"plan.{min(unknown)}: unknown line; a plan section has {', '.join(_LINES)}: correct or remove it")
        split, activation, recompute = (dict(section.get(line) or {}) for line in ("split", "activation", "recompute"))
        _check_words("split", split, get_args(Kind), "a layer is split as")
        _check_words("activation", activation, get_args(Activation), "a column layer's activations are")
        _check_words("recompute", recompute, RECOMPUTE_WORDS, "what is recomputed of a block is")
        stages, segments, costs = section.get("stages"), dict(section.get("segments") or {}), dict(section.get("costs") or {})
        if stages is not None and not _are_sizes(stages):
            raise PlanError(f"plan.stages={stages}: write a list with the number of blocks on each stage, such as [5, 7]")
        for pattern, seconds in costs.items():
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
                raise PlanError(f"plan.costs={{{pattern}: {seconds}}}: write the seconds that a block takes, such as 0.011")
        for pattern, sizes in segments.items():
            if not _are_sizes(sizes):
                raise PlanError(
                    f"plan.segments={{{pattern}: {sizes}}}: write a list with the sizes of the fused parts, such as [64, 16, 16]"
                )
        whole = {pattern: tuple(sizes) for pattern, sizes in segments.items()}
        offload = dict(section.get("offload_activations") or {})
        for pattern, chosen in offload.items():
            if not isinstance(chosen, bool):
                raise PlanError(f"plan.offload_activations={{{pattern}: {chosen}}}: write true or false")
        backend, counts = read_backend(section.get("compile")), None if stages is None else tuple(stages)
        chain, fp8 = _read_chain(section.get("chain")), section.get("fp8")
        if fp8 is not None:
            check_float8_word(fp8)
        return cls(chain, counts, costs, split, whole, activation, recompute, offload, backend, fp8)

    def kinds(self, layers: Iterable[str]) -> dict[str, Kind]:
        """The chosen kind of each layer that a pattern names.

        Raises:
            PlanError: a pattern matches no layer.
        """
        return _matched("split", self.split, list(layers))

    def segments_of(self, layers: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """The chosen sizes of fused parts, of each layer that a pattern names; raises as `kinds`."""
        return _matched("segments", self.segments, list(layers))

    def activations(self, layers: Iterable[str]) -> dict[str, Activation]:
        """The chosen activations, of each layer that a pattern names; raises as `kinds`."""
        return _matched("activation", self.activation, list(layers))

    def seconds(self, blocks: Sequence[str]) -> list[float] | None:
        """The costs of what is before the blocks, of each block, and of what is after them; None where the user gives none.

        Raises:
            PlanError: a pattern matches no block, or a block has no cost.
        """
        if not self.costs:
            return None
        patterns = {pattern: seconds for pattern, seconds in self.costs.items() if pattern not in _ENDS}
        found = _matched("costs", patterns, list(blocks), "block")
        left_out = [path for path in blocks if path not in found]
        if left_out:
            raise PlanError(
                f"plan.costs has no seconds for {_examples(left_out)}: give every block some, because seconds and the operations "
                "of the dry run do not compare"
            )
        return [self.costs.get("first", 0.0), *(found[path] for path in blocks), self.costs.get("last", 0.0)]

    def recomputed(self, blocks: Iterable[str]) -> dict[str, RecomputeWord]:
        """What is computed again of each block that a pattern names, or that it is to be found out; raises as `kinds`."""
        return _matched("recompute", self.recompute, list(blocks), "block")

    def offloaded(self, blocks: Iterable[str]) -> dict[str, bool]:
        """Whether each block that a pattern names is offloaded; raises as `kinds`."""
        return _matched("offload_activations", self.offload_activations, list(blocks), "block")


def _read_chain(value: Any) -> str | tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(path, str) for path in value):
        return tuple(value)
    raise PlanError(f"plan.chain={value}: write the path of a container of blocks, or a list of paths such as [encoder, decoder]")


def check_recompute_word(word: str) -> None:
    """Check the strategy's ``recompute``, which speaks for every block.

    Raises:
        PlanError: no such word.
    """
    if word not in RECOMPUTE_WORDS:
        raise PlanError(f"recompute={word}: use one of {', '.join(RECOMPUTE_WORDS)}")


def check_float8_word(word: str) -> None:
    """Check the name of a float8 recipe.

    Raises:
        PlanError: no such word.
    """
    if word not in get_args(Float8Recipe):
        raise PlanError(f"fp8={word}: use one of {', '.join(get_args(Float8Recipe))}")


def _check_words(line: str, chosen: Mapping[str, Any], words: tuple[str, ...], what: str) -> None:
    for pattern, word in chosen.items():
        if word not in words:
            raise PlanError(f"plan.{line}={{{pattern}: {word}}}: {what} one of {', '.join(words)}")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(size, int) and size > 0 for size in value)


def _matched(line: str, chosen: Mapping[str, T], names: list[str], what: str = "layer") -> dict[str, T]:
    """What was chosen for each layer or block; a later pattern wins."""
    found: dict[str, T] = {}
    for pattern, value in chosen.items():
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            written = list(value) if isinstance(value, tuple) else value
            raise PlanError(
                f"plan.{line}={{{pattern}: {written}}} matches no {what}; the module has {_examples(names)}: "
                "correct the pattern (* matches any text)"
            )
        found.update(dict.fromkeys(matched, value))
    return found


def _examples(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "no Linear, Conv1D or Embedding layers"
