"""The plan: frozen data that says what is split how and what runs where. Nothing below it decides anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_par.layout import Layout
from lightning_par.plan.memory import RankMemory
from lightning_par.plan.output import LeafPlan, OutputPlan
from lightning_par.runtime.parameter import ParameterSpec, Split
from lightning_par.runtime.template import Path

Kind = Literal["column", "row", "vocabulary", "replicate"]
Activation = Literal["local", "global"]
Recompute = Literal["none", "selective", "full"]
Float8Recipe = Literal["tensorwise", "rowwise"]


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
        aliases: every registered name, each with the pp coordinates that use it under that name.
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
        paths: module paths of the containers, in order of execution.
        blocks: module paths of all blocks, in order.
        carry_argument: position or keyword of the hidden state among a block's arguments, by block.
        outputs: what stands for a block's output on a stage that does not run it, by block.
        recompute: what of a block's activations the backward computes again, see `lightning_par.recompute.block`.
        offload_activations: whether what autograd saves of a block waits in the memory of the host, see `lightning_par.offload`.
        has_gradients: whether a block is called with gradients enabled, by block; not so in reentrant checkpointing.
        keeps_shape: whether every block leaves the hidden state in the shape and dtype in which the first one got it.
        is_static: whether the code reads no value of a tensor before the end of the blocks, so that shapes follow from those of
            the batch.
    """

    paths: tuple[str, ...]
    blocks: tuple[str, ...]
    carry_argument: tuple[int | str, ...]
    outputs: tuple[OutputPlan, ...]
    recompute: tuple[Recompute, ...]
    offload_activations: tuple[bool, ...]
    has_gradients: tuple[bool, ...]
    keeps_shape: bool
    is_static: bool


@dataclass(frozen=True)
class CarriedPlan:
    """A tensor that crosses a stage boundary beside the hidden state; both stages find the same object by it.

    Attributes:
        module: path of the module whose call shows it: for an argument, the first block of the stage that receives; for an output,
            a module that is called once, before that block, on every stage.
        place: among the arguments of that call, or in what it returned.
        path: where in there, see `lightning_par.runtime.template`; the first key of an argument is its position or keyword. The
            place of the hidden state itself says that code after the block goes on reading the hidden state that came in.
        has_gradient: whether a gradient comes back.
    """

    module: str
    place: Literal["argument", "output"]
    path: Path
    has_gradient: bool = True


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
class Float8Plan:
    """What multiplies in float8.

    Attributes:
        recipe: how operands are scaled, see `lightning_par.tensor.float8`.
        layers: names of linear layers.
    """

    recipe: Float8Recipe
    layers: tuple[str, ...]


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage, of pp x vp.

    Attributes:
        first, last: its blocks, from ``first`` up to but not including ``last``.
        num_parameters: elements of the global parameters that it reads.
        parameter_bytes: bytes of them on each of its ranks; a rank holds once what several of its stages read.
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
class ForwardWork:
    """What the forward of the traced batch multiplies.

    Attributes:
        causal_flops, whole_flops: floating-point operations, with causal attention counted half, and whole.
        samples: in the batch.
        tokens: of each of them; None where they have none.
    """

    causal_flops: float
    whole_flops: float
    samples: int
    tokens: int | None


@dataclass(frozen=True)
class Plan:
    """All decisions of a run.

    Attributes:
        layout: sizes of the axes, dp and microbatches filled in.
        module: class name of the user's module.
        boundaries: for each stage but the first, what it receives beside the hidden state.
        notes: what the user should know, such as what could not be split.
        sequence: under sequence parallelism, what is cut along the sequence.
        compilation: what is compiled, if anything.
        float8: what multiplies in float8, if anything.
        memory: what ranks store, by pp coordinate; empty where it was not asked for.
        module_flops: forward operations for the traced batch, by the path of the innermost module that ran; ``""`` is the step.
        work: all of the forward, fused attention included, which the other numbers of operations leave out; None where it is not
            known.
    """

    layout: Layout
    module: str
    chain: ChainPlan | None
    stages: tuple[StagePlan, ...]
    layers: tuple[LayerPlan, ...]
    parameters: tuple[ParameterPlan, ...]
    boundaries: tuple[tuple[CarriedPlan, ...], ...] = ()
    notes: tuple[str, ...] = ()
    sequence: SequencePlan | None = None
    compilation: CompilePlan | None = None
    float8: Float8Plan | None = None
    memory: tuple[RankMemory, ...] = ()
    module_flops: Mapping[str, int] = field(default_factory=dict)
    work: ForwardWork | None = None

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
            chain=None if data["chain"] is None else _chain(data["chain"]),
            stages=tuple(StagePlan(**stage) for stage in data["stages"]),
            layers=tuple(LayerPlan(**_tuples(layer)) for layer in data["layers"]),
            parameters=tuple(_parameter(entry) for entry in data["parameters"]),
            boundaries=tuple(tuple(CarriedPlan(**_tuples(one)) for one in received) for received in data["boundaries"]),
            notes=tuple(data["notes"]),
            sequence=None if data["sequence"] is None else SequencePlan(**_tuples(data["sequence"])),
            compilation=None if data["compilation"] is None else CompilePlan(**_tuples(data["compilation"])),
            float8=None if data["float8"] is None else Float8Plan(**_tuples(data["float8"])),
            memory=tuple(RankMemory(**entry) for entry in data.get("memory", ())),
            module_flops=data["module_flops"],
            work=None if data.get("work") is None else ForwardWork(**data["work"]),
        )


def _chain(data: dict[str, Any]) -> ChainPlan:
    data = _tuples(data)
    outputs = tuple(
        OutputPlan(**{**output, "leaves": tuple(LeafPlan(**leaf) for leaf in output["leaves"])}) for output in data.pop("outputs")
    )
    return ChainPlan(outputs=outputs, **data)


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
