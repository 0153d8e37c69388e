"""Installing a plan on a module: the one place where a user's module is changed, in an order that is the documentation.

1. shard       every parameter becomes this rank's shard, in the precision of the run; what the stage does not hold becomes a
               placeholder. Weights that have no memory yet are made here, this rank's shards alone
2. convert     planned layers compute on their shards
3. float8      planned linear layers multiply in float8
4. defer       for a schedule that splits the backward, linear layers can leave their weight gradients for later
5. compile     planned modules are compiled when they are first called
6. recompute   blocks whose activations are to be recomputed run inside torch's checkpointing
7. offload     blocks whose activations are to wait on the host have hooks on what autograd saves
8. cut         blocks of other stages only pass the hidden state on, or end the step; buffers without memory are made
"""

from __future__ import annotations

import re
from collections.abc import Iterable, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_par.compilation import compile_modules
from lightning_par.errors import ModelError
from lightning_par.materialize import LateValues, Weights, give_values, is_deferred, materialize_rest, materialize_shard
from lightning_par.offload import offload_blocks
from lightning_par.pipeline.stage import StageProgram
from lightning_par.plan import LayerPlan, Plan
from lightning_par.plan.plan import ParameterPlan
from lightning_par.recompute import recompute_blocks
from lightning_par.runtime.axis import Axis
from lightning_par.runtime.deferral import DeferredGradients
from lightning_par.runtime.parameter import set_spec
from lightning_par.runtime.precision import FULL, Precision
from lightning_par.split_backward import defer_weight_gradients
from lightning_par.tensor import (
    Float8Arithmetic,
    SequenceParallel,
    SharedInput,
    convert_embedding,
    convert_linear,
    convert_positionwise,
    multiply_in_float8,
    whole_tensor,
)


def install(
    module: nn.Module,
    plan: Plan,
    pp: int,
    tp: Axis,
    device: torch.device,
    deferred: DeferredGradients | None = None,
    weights: Weights | None = None,
    precision: Precision = FULL,
    late: LateValues | None = None,
) -> StageProgram:
    """Make ``module`` this rank's part of the plan, in place. Not a collective.

    Parameter names, parameter objects and modules stay the user's own. What is left of the module is not moved.

    Args:
        module: the whole module, with the same weights on every rank.
        plan: all decisions.
        pp: this rank's pp coordinate.
        tp: this rank's tensor-parallel axis.
        device: where the module is going to run; placeholders are made there.
        deferred: where layers leave their weight gradients during an action I; None where the schedule has none.
        weights: values in files that win over the module's own.
        precision: what parameters and buffers are cast to.
        late: takes the deferred parameters, which get their memory later; None to give it to them at once.
    """
    shard_parameters(module, plan.parameters, pp, tp, device, weights, precision, late)
    sequence = _sequence(plan, tp)
    convert_layers(module, plan, pp, tp, sequence)
    if plan.float8 is not None:
        held = [name for name in plan.float8.layers if module.get_submodule(name)._parameters.get("weight") is not None]
        emulate = device.type == "cpu"
        multiply_in_float8(module, held, Float8Arithmetic(plan.float8.recipe, emulate, None if emulate else "inductor"))
    if deferred is not None:
        defer_weight_gradients(module, deferred)
    compile_modules(module, plan, pp)
    recompute_blocks(module, plan, pp, tp)
    offload_blocks(module, plan, pp, device)
    stages = cut_stages(module, plan, pp, device, sequence, precision)
    materialize_rest(module)
    if weights is not None:
        weights.read_buffers(module)
    precision.convert_module(module)
    return stages


def install_tensor_parallel(module: nn.Module, plan: Plan, tp: Axis) -> None:
    """Steps 1 and 2 for all stages at once: the module that one replica of pp 1 would run."""
    for parameter in plan.parameters:
        _shard_parameter(module, parameter, (alias for alias, _ in parameter.aliases), tp, torch.device("cpu"))
    sequence = _sequence(plan, tp)
    _convert(module, plan, plan.layers, tp, sequence)
    if plan.chain is not None and sequence is not None:
        whole = replace(plan.stages[0], last=len(plan.chain.blocks))
        StageProgram(module, replace(plan, stages=(whole,), boundaries=()), (0,), sequence)


def shard_parameters(
    module: nn.Module,
    parameters: Iterable[ParameterPlan],
    pp: int,
    tp: Axis,
    device: torch.device,
    weights: Weights | None = None,
    precision: Precision = FULL,
    late: LateValues | None = None,
) -> None:
    """Replace every parameter's data by this rank's shard, and take away what its stages do not hold."""
    for parameter in parameters:
        held = [alias for alias, holders in parameter.aliases if pp in holders]
        _shard_parameter(module, parameter, held, tp, device, weights, precision, late)
        for alias, _ in parameter.aliases:
            if alias not in held:
                owner, name = _owner(module, alias)
                shape = parameter.spec.shape  # a tied one may be a shard by now
                _take_away(owner, owner._parameters, name, device, precision, shape)


def convert_layers(module: nn.Module, plan: Plan, pp: int, tp: Axis, sequence: SequenceParallel | None = None) -> None:
    """Convert the planned layers whose weight this rank holds, and the modules that run on parts of the sequence."""
    held = {alias for parameter in plan.parameters for alias, holders in parameter.aliases if pp in holders}
    if tp.size > 1:  # in evaluation nn.TransformerEncoderLayer hands its weights, shards by now, to one fused kernel
        torch.backends.mha.set_fastpath_enabled(False)
    _convert(module, plan, [layer for layer in plan.layers if f"{layer.name}.weight" in held], tp, sequence)


def cut_stages(
    module: nn.Module,
    plan: Plan,
    pp: int,
    device: torch.device,
    sequence: SequenceParallel | None = None,
    precision: Precision = FULL,
) -> StageProgram:
    """Change the calls of blocks so that each stage of this rank runs alone.

    Buffers of the blocks of other ranks go the way of their parameters.
    """
    held = set(plan.blocks_at(pp))
    for index, path in enumerate(plan.chain.blocks if plan.chain is not None and plan.layout.pp > 1 else ()):
        for owner in module.get_submodule(path).modules() if index not in held else ():
            for name in list(owner._buffers):
                _take_away(owner, owner._buffers, name, device, precision)
    return StageProgram(module, plan, plan.layout.stages_of(pp), sequence, whole_tensor)


def _sequence(plan: Plan, tp: Axis) -> SequenceParallel | None:
    return None if plan.sequence is None else SequenceParallel(tp, plan.sequence.dim)


def _convert(module: nn.Module, plan: Plan, layers: Iterable[LayerPlan], tp: Axis, sequence: SequenceParallel | None) -> None:
    if tp.size == 1:
        return
    if plan.sequence is not None and sequence is not None:
        for name in plan.sequence.modules:
            convert_positionwise(module.get_submodule(name), sequence)
    inputs: dict[str, SharedInput] = {}
    refused: dict[str, ModelError] = {}
    for layer in layers:
        shared = inputs.setdefault(layer.shared, SharedInput()) if layer.shared else None
        try:
            _convert_layer(module.get_submodule(layer.name), layer, tp, shared, sequence)
        except ModelError as error:
            refused.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name), error)
    if refused:
        lines = ", ".join(f"{pattern}: replicate" for pattern in refused)
        raise ModelError(f"{next(iter(refused.values()))}: plan.split={{{lines}}}")


def _convert_layer(
    child: nn.Module, layer: LayerPlan, tp: Axis, shared: SharedInput | None, sequence: SequenceParallel | None
) -> None:
    if layer.kind == "vocabulary":
        assert isinstance(child, nn.Embedding)
        convert_embedding(child, tp, child.num_embeddings)
    elif layer.kind == "column" or layer.kind == "row":  # one by one, for mypy
        convert_linear(
            child,
            layer.kind,
            tp,
            segments=layer.segments or None,
            copies=layer.copies,
            output=layer.activation,
            shared=shared,
            sequence=sequence,
            is_padded=layer.activation == "global",  # the plan has refused what must divide
        )


def _shard_parameter(
    module: nn.Module,
    plan: ParameterPlan,
    aliases: Iterable[str],
    tp: Axis,
    device: torch.device,
    weights: Weights | None = None,
    precision: Precision = FULL,
    late: LateValues | None = None,
) -> None:
    """Give the parameter its shard under every alias; ties stay ties."""
    aliases = list(aliases)
    if not aliases:
        return
    owner, name = _owner(module, aliases[0])
    parameter = owner._parameters[name]
    assert parameter is not None
    spec, names = plan.spec, [alias for alias, _ in plan.aliases]
    split, dtype = spec.split if tp.size > 1 else None, precision.dtype_of(parameter)
    where = split, tp.size, tp.coordinate

    def read(out: torch.Tensor | None = None) -> torch.Tensor | None:
        return None if weights is None else weights.read_shard(names, *where, dtype, out)

    if not is_deferred(parameter):
        values = read()
        if values is None:
            whole = parameter.data
            values = precision.convert(whole if split is None else split.shard(whole, tp.size, tp.coordinate))
        parameter.data = values
    elif late is None:
        values = read()
        give_values(parameter, precision.convert(materialize_shard(parameter, *where)) if values is None else values, spec.name)
    else:
        recorded = parameter.detach()  # shows the record when the parameter does not any more

        def write(out: torch.Tensor) -> None:
            if read(out) is None:
                materialize_shard(recorded, *where, out)

        shape = tuple(parameter.shape) if split is None else split.local_shape(tuple(parameter.shape), tp.size)
        late.add(parameter, torch.empty(shape, dtype=dtype, device=device), spec.name, write)
    set_spec(parameter, spec)


def _take_away(
    owner: nn.Module,
    tensors: MutableMapping[str, Any],
    name: str,
    device: torch.device,
    precision: Precision,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Put zeros of the same shape, which take no memory, where a parameter or buffer was.

    Those of a parameter require a gradient, which never arrives: reentrant checkpointing of a block drops all gradients when
    its input, computed from them, requires none.
    """
    tensor = tensors.pop(name)
    zeros = (
        None if tensor is None else torch.zeros((), dtype=precision.dtype_of(tensor), device=device).expand(shape or tensor.shape)
    )
    if zeros is not None and isinstance(tensor, nn.Parameter) and zeros.is_floating_point():
        zeros.requires_grad_()
    owner.__dict__[name] = zeros  # past __setattr__, which would make it a buffer or refuse it


def _owner(module: nn.Module, alias: str) -> tuple[nn.Module, str]:
    path, _, name = alias.rpartition(".")
    return module.get_submodule(path), name
