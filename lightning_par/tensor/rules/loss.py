"""Losses on logits that are cut along the classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from lightning_par.tensor.loss import vocabulary_parallel_cross_entropy
from lightning_par.tensor.registry import NoRule, rule_for
from lightning_par.tensor.sharded import ShardedTensor


@rule_for(functional.cross_entropy)
def cross_entropy(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _cross_entropy(*args, **kwargs)


def _cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy` for class indices; probabilities as targets run on gathered logits."""
    if not isinstance(input, ShardedTensor) or isinstance(target, ShardedTensor) or target.is_floating_point():
        raise NoRule
    class_dim = min(1, input.ndim - 1)
    if input.shard_dim != class_dim or len(input.segments) > 1 or size_average is not None or reduce is not None:
        raise NoRule
    logits = input.local.movedim(class_dim, -1)
    if logits.shape[:-1] != target.shape:
        raise NoRule  # torch's own message
    return vocabulary_parallel_cross_entropy(
        logits, target, input.axis, weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
