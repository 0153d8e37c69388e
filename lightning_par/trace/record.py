"""What a dry run leaves behind: a graph of operations over numbered values, and where each one ran.

A step is seen as a chain of n blocks with code around them. *Phases* number its parts in order of execution::

    phase      0          1        2       3        4     ...   2n-1       2n
    code    prologue   block 0   glue   block 1   glue        block n-1  epilogue

Glue and the epilogue run on the stage of the block before them, the prologue on the first block's: a stage ends where the
first block of the next one is called. Several containers whose blocks run one container after the other, as an encoder's and a
decoder's, are one chain. Blocks of containers that are no part of it have no phases of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from lightning_par.runtime.template import Path, Template

LayerKind = Literal["linear", "conv1d", "embedding"]


@dataclass(frozen=True)
class Value:
    """One version of a tensor seen in the step.

    Attributes:
        shape: its shape.
        is_float: whether it can carry a gradient.
        depends_on_parameters: whether any parameter went into it, so that only a stage with that parameter can compute it.
        phase: where it was made; -1 for what was there before the step (the batch, buffers).
        is_batch: whether it is a tensor of the batch, or only reshaped from one.
        content: a number for the elements of a tensor that no torch function made, such as one from numpy; None where unknown.
        dtype: such as ``float32``.
    """

    shape: tuple[int, ...]
    is_float: bool
    depends_on_parameters: bool
    phase: int
    is_batch: bool = False
    content: int | None = None
    dtype: str = ""


@dataclass(frozen=True)
class Op:
    """One call of a torch function, or of a whole layer (a Linear, Conv1D or Embedding module).

    Attributes:
        name: the function's name, such as ``view``; for a layer, its kind.
        module: path of the innermost module that was running.
        phase: part of the step, see the module's docstring.
        inputs, outputs: value numbers.
        parameters: names of parameters read directly, as registered where they were read.
        layer: path of the layer when the op is a layer's call.
        arguments: the arguments that are not tensors, positional then by name; tensors stand as ``"<tensor>"``.
        block: path of the block that was running, of the chain or of another container; empty outside.
        writes_view: whether it changes a tensor in place, and another tensor is a view of the same memory.
        writes: whether it changes a tensor in place.
    """

    name: str
    module: str
    phase: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: tuple[str, ...] = ()
    layer: str | None = None
    arguments: tuple[Any, ...] = ()
    block: str = ""
    writes_view: bool = False
    writes: bool = False

    @property
    def named(self) -> dict[str, Any]:
        """The arguments that were given by name."""
        return {item[0]: item[1] for item in self.arguments if _is_named(item)}

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument that stands at ``position`` or is called ``name``."""
        positional = [item for item in self.arguments if not _is_named(item)]
        return self.named.get(name, positional[position] if len(positional) > position else default)


def _is_named(item: Any) -> bool:
    return type(item) is tuple and len(item) == 2 and type(item[0]) is str


@dataclass(frozen=True)
class Layer:
    """A layer that tensor parallelism knows how to split.

    Attributes:
        kind: ``linear``, ``conv1d`` (transformers': weight is [in, out]) or ``embedding``.
        in_size, out_size: features; rows and columns of an embedding.
        weight, bias: parameter names; ``bias`` is None without one.
    """

    name: str
    kind: LayerKind
    in_size: int
    out_size: int
    weight: str
    bias: str | None


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter by its first name.

    Attributes:
        aliases: every name under which the same tensor is registered, the first name included.
        itemsize: bytes of one element.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    requires_grad: bool
    aliases: tuple[str, ...]

    @property
    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class Block:
    """One call of a block of the chain.

    Attributes:
        path: module path.
        carry_argument: where the hidden state comes in: a position, or the name of a keyword.
        carry_output: where it comes out: the path in what the block returns, ``()`` for a bare tensor.
        carry_in, carry_out: value numbers.
        arguments: value numbers of all tensors among the arguments, by path; a path begins with a position or a keyword.
        template: what the block returns, see `lightning_par.runtime.template`.
        results: value numbers of all tensors in it, by path.
        passed: for each of them that is one of the arguments, the path of that argument.
        has_gradients: whether it was called with gradients enabled: not inside reentrant checkpointing.
    """

    path: str
    carry_argument: int | str
    carry_output: Path
    carry_in: int
    carry_out: int
    arguments: Mapping[Path, int]
    template: Template
    results: Mapping[Path, int]
    passed: Mapping[Path, Path]
    has_gradients: bool = False


@dataclass(frozen=True)
class Output:
    """A tensor in what a module returned, outside of blocks or from a block.

    Attributes:
        module: its path.
        path: where the tensor is in the output.
        phase: in which phase of the step it was returned; for a block, the one after it.
    """

    module: str
    path: Path
    phase: int


@dataclass(frozen=True)
class Trace:
    """Everything that one dry run of a step tells.

    Attributes:
        step: the hook that was run, such as ``training_step``.
        chains: paths of the containers of the blocks, in order of execution; empty when the module has none.
        chains_seen: containers that were looked at, with the reason why each was not taken.
        flops: forward floating-point operations by phase.
        module_flops: the same by the path of the innermost module that ran; under ``""`` those of the step itself.
        saved_bytes: activation bytes that autograd saved, by phase.
        attention_flops: what fused attention adds to ``flops``, with causal attention counted half, and whole.
        tokens: of each sample of the batch; None where samples have none.
        notes: what the trace had to assume, for the user.
        error: what ended the run early, when the caller asked for the trace up to there.
        is_real: whether the step was run on real tensors, because it fails on fake ones.
        leaving: value numbers of the tensors that blocks of other containers than the chain returned.
        first_read: how many operations had run when the code first read the value of a tensor, which may change its way from
            one batch to the next; None when it never did.
        bound: parameters that something besides the forward holds on to, which must stay the tensors that they are; and what.
        objects: for each value, the number of the first version of the same tensor object.
        memories: for each value, the number of the first value in the same memory.
        outputs: for each tensor object, by its first number, the modules that returned it, where each was called once.
        returned: numbers of the tensors that the step returned.
        logged: numbers of the tensors that the step logged, each with the phase.
        looked_at: numbers of the tensors whose value the code read, each with the function and the phase.
        writes: changes in place of buffers and of tensors that are attributes of modules: the path, the function, the phase.
        again: operations of a second pass over the blocks, in a step that is not trained and goes on calling them. What comes
            after is not seen. All else is about the first pass.
    """

    step: str
    chains: tuple[str, ...]
    chains_seen: tuple[tuple[str, str], ...]
    blocks: tuple[Block, ...]
    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    layers: dict[str, Layer]
    parameters: dict[str, ParameterInfo]
    flops: tuple[int, ...]
    module_flops: Mapping[str, int]
    saved_bytes: tuple[int, ...]
    batch_size: int
    attention_flops: tuple[float, float] = (0.0, 0.0)
    tokens: int | None = None
    notes: tuple[str, ...] = ()
    error: Exception | None = None
    is_real: bool = False
    leaving: frozenset[int] = frozenset()
    first_read: int | None = None
    bound: Mapping[str, str] = field(default_factory=dict)
    again: tuple[Op, ...] = ()
    objects: tuple[int, ...] = ()
    memories: tuple[int, ...] = ()
    outputs: Mapping[int, tuple[Output, ...]] = field(default_factory=dict)
    returned: tuple[int, ...] = ()
    logged: tuple[tuple[int, int], ...] = ()
    looked_at: tuple[tuple[int, str, int], ...] = ()
    writes: tuple[tuple[str, str, int], ...] = ()

    @property
    def chain_name(self) -> str:
        """The containers of the blocks, for messages."""
        return " and ".join(name or "the module" for name in self.chains)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def block_of(self, phase: int) -> int:
        """The block on whose stage an operation of ``phase`` runs; 0 when there is no chain."""
        return phase // 2 if phase % 2 else max(0, phase // 2 - 1)

    def is_inside_block(self, op: Op) -> bool:
        """Whether an operation is inside a block; without a chain the whole step counts as one block."""
        return op.block != "" or not self.blocks

    def canonical(self, alias: str) -> str:
        """The first name of the parameter registered as ``alias``."""
        return self._first_names[alias]

    @cached_property
    def _first_names(self) -> dict[str, str]:
        return {alias: name for name, info in self.parameters.items() for alias in info.aliases}

    @cached_property
    def readers(self) -> dict[int, list[Op]]:
        """The operations that read each value, in order."""
        readers: dict[int, list[Op]] = {}
        for op in self.ops:
            for number in set(op.inputs):
                readers.setdefault(number, []).append(op)
        return readers
