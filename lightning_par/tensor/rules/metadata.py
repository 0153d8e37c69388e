"""Functions and attributes that only read what the local part has in common with the whole, or hang something on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from lightning_par.errors import ModelError
from lightning_par.tensor.registry import function_name, getters, rule_for, setters, spellings
from lightning_par.tensor.rules.operand import aligned_part, sharded_input
from lightning_par.tensor.sharded import ShardedTensor

_FUNCTIONS = """
element_size get_device is_complex is_conj is_contiguous is_floating_point is_inference is_neg is_pinned is_signed
new_empty new_full new_ones new_tensor new_zeros
"""

_ATTRIBUTES = """
is_cpu is_cuda is_meta is_mkldnn is_mps is_nested is_quantized is_sparse is_sparse_csr is_xla is_xpu itemsize layout
output_nr retains_grad _version
"""


@rule_for(*spellings(_FUNCTIONS), *getters(_ATTRIBUTES))
def ask_local(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The answer of the local part. The ``new_`` functions take global sizes and give replicated tensors."""
    return function(sharded_input(args).local, *args[1:], **kwargs)


@rule_for(*spellings("result_type is_same_size"))
def compare(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Ask about two tensors without their values."""
    if function in spellings("is_same_size"):
        return args[0].shape == args[1].shape
    return function(*(value.local if isinstance(value, ShardedTensor) else value for value in args), **kwargs)


@rule_for(torch.Tensor.stride)
def stride(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Strides of a whole tensor laid out like the local one: those that step over the cut dim are longer."""
    tensor = sharded_input(args)
    local, cut = tensor.local.stride(), tensor.shard_dim
    whole, own = tensor.shape[cut], tensor._local.shape[cut]
    strides = tuple(step // own * whole if step > local[cut] else step for step in local)
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return strides if dim is None else strides[dim]


@rule_for(*spellings("data_ptr untyped_storage storage set_ share_memory_ __dlpack__"))
def refuse_memory(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    """There is no memory that holds the whole tensor."""
    raise ModelError(f"{function.__name__} needs the memory of a sharded tensor: use x.full_tensor() or x.local")


@rule_for(*getters("data grad"))
def companion(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.data`` and ``x.grad``: cut like ``x``."""
    tensor = sharded_input(args)
    result = function(tensor.local)
    return result if result is None else tensor.rewrap(result)


@rule_for(*setters("data"))
def set_data(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``x.data = y``: the part of ``y`` that belongs to ``x``."""
    tensor, value = args
    if not isinstance(tensor, ShardedTensor) or value.shape != tensor.shape:
        raise ModelError("x.data = y, where one of them is a sharded tensor, needs a sharded x and a y of its shape")
    with torch.no_grad():
        tensor.local.data = aligned_part(value, tensor.shard_dim - tensor.ndim, tensor.segments, tensor.axis)


@rule_for(*setters("grad real imag"))
def refuse_setting(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    """What would be set on a gathered copy, and lost."""
    raise ModelError(f"x.{function_name(function)} = y, where one of them is a sharded tensor: use x.local and y.local")


@rule_for(torch.Tensor.retain_grad)
def retain_grad(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep the gradient of the local part; ``x.grad`` reads it."""
    function(sharded_input(args).local)


@rule_for(torch.Tensor.register_hook)
def register_hook(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The user's hook sees and gives sharded gradients."""
    tensor, hook = sharded_input(args), args[1]

    def on_local(grad: torch.Tensor) -> torch.Tensor | None:
        result = hook(tensor.rewrap(grad))
        return result.local if isinstance(result, ShardedTensor) else result

    return function(tensor.local, on_local)
