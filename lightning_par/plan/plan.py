"""The plan: frozen data that says what is split how and what runs where. Nothing below it decides anything."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from lightning_par.layout import Layout
from lightning_par.runtime.parameter import ParameterSpec, Split

Kind = Literal["column", "row", "vocabulary", "replicate"]
Activation = Literal["local", "global"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class LayerPlan:
    """How one Linear, Conv1D or Embedding is split over tp.

    Attributes:
        name: module path.
        kind: ``column`` (output features), ``row`` (input features), ``vocabulary`` (rows of an embedding) or ``replicate``.
        segments: sizes of the fused parts of a column layer's output, such as query, key and value.
        copies: ranks in a row that hold the same share, for each segment; empty where every rank has shares of its own.
        activation: what a column layer gives the user's code: the local part as a plain tensor, or a tensor of global shape.
        shared: name of the first column layer that reads the same tensor; they share one gradient reduction.
        why: the reason, for the user.
    """

    name: str
    kind: Kind
    segments: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()
    activation: Activation = "local"
    shared: str = ""
    why: str = ""


@dataclass(frozen=True)
class ParameterPlan:
    """What becomes of one parameter.

    Attributes:
        spec: the record that its shards carry.
        aliases: every registered name, each with the stages that use it under that name.
        itemsize: bytes of one element.
    """

    spec: ParameterSpec
    aliases: tuple[tuple[str, tuple[int, ...]], ...]
    itemsize: int
    requires_grad: bool

    def local_numel(self, tp: int) -> int:
        """Elements that one rank holds, padding included."""
        split = self.spec.split
        return math.prod(self.spec.shape if split is None else split.local_shape(self.spec.shape, tp))


@dataclass(frozen=True)
class ChainPlan:
    """The chain of blocks and how a hidden state passes through one.

    Attributes:
        path: the container's module path.
        carry_argument: position or keyword of the hidden state among a block's arguments, by block.
        carry_output: where it is in a block's output, see `lightning_par.trace.Block`.
        output_keys: keys of a block's output.
        recompute: what of a block's activations the backward computes again, see `lightning_par.recompute.block`.
    """

    path: str
    carry_argument: tuple[int | str, ...]
    carry_output: tuple[tuple[int | str, ...], ...]
    output_keys: tuple[tuple[int | str, ...], ...]
    recompute: tuple[Recompute, ...]


@dataclass(frozen=True)
class SequencePlan:
    """How hidden states are cut between the blocks, under sequence parallelism.

    Attributes:
        dim: the sequence dim of a hidden state.
        modules: paths of the modules that treat every position alike, and run on a rank's part as a plain tensor.
    """

    dim: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class CompilePlan:
    """What torch.compile compiles.

    Attributes:
        backend: of torch.compile.
        modules: paths of the modules that are compiled, each on its own; equal ones share what was compiled.
    """

    backend: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage.

    Attributes:
        first, last: its blocks, from ``first`` up to but not including ``last``.
        num_parameters: elements of the global parameters that it holds.
        parameter_bytes: bytes of them on each of its ranks.
        flops: forward operations for the traced batch, over its tp ranks together.
        saved_bytes: activation bytes that autograd keeps for the traced batch, unsplit and with nothing recomputed.
    """

    first: int
    last: int
    num_parameters: int
    parameter_bytes: int
    flops: int
    saved_bytes: int


@dataclass(frozen=True)
class Plan:
    """All decisions of a run.

    Attributes:
        layout: sizes of the axes, dp and microbatches filled in.
        module: class name of the user's module.
        notes: what the user should know, such as what could not be split.
        sequence: under sequence parallelism, what is cut along the sequence.
        compilation: what is compiled, if anything.
    """

    layout: Layout
    module: str
    chain: ChainPlan | None
    stages: tuple[StagePlan, ...]
    layers: tuple[LayerPlan, ...]
    parameters: tuple[ParameterPlan, ...]
    notes: tuple[str, ...] = ()
    sequence: SequencePlan | None = None
    compilation: CompilePlan | None = None

    def layer(self, name: str) -> LayerPlan | None:
        """The plan of one layer."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def blocks_at(self, pp: int) -> tuple[int, ...]:
        """The blocks, by index, of all stages at a pp coordinate."""
        stages = (self.stages[stage] for stage in self.layout.stages_of(pp)) if self.chain is not None else ()
        return tuple(index for stage in stages for index in range(stage.first, stage.last))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML: mappings, lists, strings and numbers."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The inverse of `to_dict`."""
        return cls(
            layout=Layout(**data["layout"]),
            module=data["module"],
            chain=None if data["chain"] is None else ChainPlan(**_tuples(data["chain"])),
            stages=tuple(StagePlan(**stage) for stage in data["stages"]),
            layers=tuple(LayerPlan(**_tuples(layer)) for layer in data["layers"]),
            parameters=tuple(_parameter(entry) for entry in data["parameters"]),
            notes=tuple(data["notes"]),
            sequence=None if data["sequence"] is None else SequencePlan(**_tuples(data["sequence"])),
            compilation=None if data["compilation"] is None else CompilePlan(**_tuples(data["compilation"])),
        )


def _parameter(data: dict[str, Any]) -> ParameterPlan:
    data = _tuples(data)
    spec = dict(data.pop("spec"))
    split = spec.pop("split")
    return ParameterPlan(spec=ParameterSpec(**spec, split=None if split is None else Split(**split)), **data)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_tuples(item) for item in value)
    return value
