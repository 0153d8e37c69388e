"""Losses on logits that are cut along the classes: none of them needs whole logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from lightning_par.tensor.along_cut import pick
from lightning_par.tensor.loss import reduced, vocabulary_parallel_cross_entropy
from lightning_par.tensor.registry import NoRule, rule_for, spellings
from lightning_par.tensor.rules.along_cut import is_along_cut
from lightning_par.tensor.rules.pointwise import pointwise
from lightning_par.tensor.sharded import ShardedTensor

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

_ELEMENTWISE = "binary_cross_entropy_with_logits huber_loss kl_div l1_loss mse_loss smooth_l1_loss"


@rule_for(functional.cross_entropy)
def cross_entropy(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    return _cross_entropy(*args, **kwargs)


@rule_for(*spellings("nll_loss"))
def nll_loss(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    return _nll_loss(*args, **kwargs)


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
    """`torch.nn.functional.cross_entropy`."""
    if size_average is not None or reduce is not None:
        raise NoRule
    if isinstance(input, ShardedTensor) and target.is_floating_point() and input.shape == target.shape and ignore_index < 0:
        return _of_probabilities(_cut_along_classes(input), target, weight, reduction, label_smoothing)
    logits = _of_classes(input, target)
    return vocabulary_parallel_cross_entropy(
        logits.local.movedim(logits.shard_dim, -1),
        target,
        logits.axis,
        vocabulary=sum(logits.segments),
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _of_probabilities(
    logits: ShardedTensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: str, label_smoothing: float
) -> torch.Tensor:
    """Cross entropy where the target is a distribution over the classes, by its definition in torch's documentation."""
    dim = logits.shard_dim
    num_classes = logits.shape[dim]
    terms = functional.log_softmax(logits, dim) * (target * (1 - label_smoothing) + label_smoothing / num_classes)
    if weight is not None:
        terms = terms * weight.view(-1, *(1,) * (logits.ndim - dim - 1))
    return reduced(-terms.sum(dim), logits.numel() / num_classes, reduction)


def _nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """`torch.nn.functional.nll_loss`: every rank gives the entries of its own classes."""
    scores = _of_classes(input, target)
    if size_average is not None or reduce is not None:
        raise NoRule
    counted = target != ignore_index
    labels = target.masked_fill(~counted, 0)
    losses = -pick(scores, labels.unsqueeze(scores.shard_dim)).squeeze(scores.shard_dim)
    if torch.is_autocast_enabled(losses.device.type):
        losses = losses.float()
    token_weight = counted.to(losses.dtype) if weight is None else weight[labels] * counted
    return reduced((losses * token_weight).masked_fill(~counted, 0), token_weight.sum(), reduction)


def _cut_along_classes(tensor: Any) -> ShardedTensor:
    """The input of a classification loss, whose classes are in dim 1 or, of one sample, in dim 0."""
    if isinstance(tensor, ShardedTensor) and is_along_cut(tensor, min(1, tensor.ndim - 1)):
        return tensor
    raise NoRule


def _of_classes(tensor: Any, target: torch.Tensor) -> ShardedTensor:
    """The input of a loss whose target is a class for every sample."""
    scores = _cut_along_classes(tensor)
    of_samples = (*scores.shape[: scores.shard_dim], *scores.shape[scores.shard_dim + 1 :])
    if isinstance(target, ShardedTensor) or target.is_floating_point() or tuple(target.shape) != of_samples:
        raise NoRule  # torch's own message
    return scores


@rule_for(*spellings(_ELEMENTWISE))
def elementwise(function: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """The loss of every element, then its sum or mean (distillation from a teacher's logits)."""
    if len(args) > 2 or kwargs.get("size_average") is not None or kwargs.get("reduce") is not None:
        raise NoRule
    losses: ShardedTensor = pointwise(function, args, {**kwargs, "reduction": "none"})
    reduction = kwargs.get("reduction", "mean")
    if reduction == "batchmean":
        return losses.sum() / losses.shape[0]
    return reduced(losses, losses.numel(), reduction)
