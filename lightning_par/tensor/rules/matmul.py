"""Products of tensors, all through one rule for labelled dims.

Every dim of every operand has a label, as in ``einsum``. One label is cut:

    an operand that has it      is cut alike, or is scattered
    an operand without it       is used as it is, and its gradient is summed over the axis
    the result, if it has it    is cut there
    otherwise                   the product contracts over it: the partial results are summed over the axis
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from lightning_par.runtime.parameter import Split
from lightning_par.tensor.ghost import shielded
from lightning_par.tensor.registry import NoRule, rule_for, spellings
from lightning_par.tensor.rules.operand import aligned_part, first_sharded, summed
from lightning_par.tensor.rules.shape import argument
from lightning_par.tensor.sharded import ShardedTensor

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Labels = Sequence[Any]
_FACTORS = {"mat1": "batch1", "mat2": "batch2"}  # addmm has other names for them than baddbmm


def product(
    function: Callable[..., torch.Tensor], operands: Sequence[torch.Tensor], labels: Sequence[Labels], result: Labels
) -> Any:
    """``function(*operands)``, a product that is linear in each operand. Ghosts count as zeros.

    Args:
        function: called on the local parts.
        operands: tensors, at least one of them sharded.
        labels: for every operand, a label for every dim.
        result: the labels of the result.
    """
    lead = first_sharded(operands)
    cut = labels[next(i for i, operand in enumerate(operands) if operand is lead)][lead.shard_dim]
    parts = []
    for operand, names in zip(operands, labels, strict=True):
        if names.count(cut) > 1:
            raise NoRule
        # a label that the operand lacks stands left of all its dims, where it broadcasts
        from_right = names.index(cut) - len(names) if cut in names else -len(names) - 1
        parts.append(aligned_part(operand, from_right, lead.segments, lead.axis, ghosts=0))
    value = function(*parts)
    if cut in result:
        where = Split(result.index(cut), lead.segments)
        return ShardedTensor(shielded(value, where, lead.axis), where.dim, where.segments, lead.axis)
    return summed(value, lead.axis)


def _matmul_labels(left: int, right: int) -> tuple[Labels, Labels, Labels]:
    """Labels for ``matmul`` of tensors with so many dims: batch dims are numbered from the right, as they broadcast."""
    batch = [f"batch{i}" for i in range(max(left, right) - 2, 0, -1)]
    left_labels = ["k"] if left == 1 else [*batch[len(batch) - (left - 2) :], "row", "k"]
    right_labels = ["k"] if right == 1 else [*batch[len(batch) - (right - 2) :], "k", "column"]
    return left_labels, right_labels, [*batch, *["row"] * (left > 1), *["column"] * (right > 1)]


@rule_for(*spellings("matmul bmm mm mv dot __matmul__"))
def matmul(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    if kwargs or len(args) != 2:
        raise NoRule
    left, right, result = _matmul_labels(args[0].dim(), args[1].dim())
    return product(function, args, (left, right), result)


@rule_for(torch.Tensor.__rmatmul__)
def rmatmul(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    return matmul(torch.matmul, (args[1], args[0]), kwargs)


@rule_for(*spellings("addmm baddbmm"))
def add_product(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """``beta * x + alpha * (a @ b)``."""
    named = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | {
        _FACTORS.get(name, name): kwargs[name] for name in kwargs
    }
    if len(args) > 3 or named.keys() - {"input", "batch1", "batch2", "beta", "alpha"}:
        raise NoRule
    start, a, b = named["input"], named["batch1"], named["batch2"]
    beta, alpha = named.get("beta", 1), named.get("alpha", 1)
    left, right, result = _matmul_labels(a.dim(), b.dim())
    value = product(torch.matmul, (a, b), (left, right), result) if _any_sharded(a, b) else torch.matmul(a, b)
    value = value if alpha == 1 else value * alpha
    return value if beta == 0 else torch.add(value, start, alpha=beta)


@rule_for(functional.linear)
def linear(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """``x @ weight.T + bias``; the bias is added once, after partial results are summed."""
    x, weight = argument(args, kwargs, 0, "input", None), argument(args, kwargs, 1, "weight", None)
    bias = argument(args, kwargs, 2, "bias", None)
    labels = [*(f"batch{i}" for i in range(x.dim() - 1)), "k"]
    if not _any_sharded(x, weight):
        raise NoRule
    value = product(functional.linear, (x, weight), (labels, ["column", "k"]), [*labels[:-1], "column"])
    return value if bias is None else value + bias.to(value.dtype)


@rule_for(torch.einsum)
def einsum(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    if not isinstance(args[0], str):
        raise NoRule
    operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    inputs, arrow, result = args[0].replace(" ", "").partition("->")
    labels = [list(names) for names in inputs.split(",")]
    if "." in inputs or len(labels) != len(operands) or any(len(n) != o.dim() for n, o in zip(labels, operands, strict=True)):
        raise NoRule
    if not arrow:
        every = "".join(inputs.split(","))
        result = "".join(sorted(name for name in set(every) if every.count(name) == 1))
    return product(lambda *parts: torch.einsum(args[0], *parts), operands, labels, list(result))


def _any_sharded(*tensors: Any) -> bool:
    return any(isinstance(tensor, ShardedTensor) for tensor in tensors)
