"""Scaled dot product attention with the cut along a batch dim, which is where the heads are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from lightning_par.runtime.axis import Axis
from lightning_par.runtime.random import sharded_stream
from lightning_par.tensor.registry import NoRule, rule_for
from lightning_par.tensor.rules.operand import aligned_part, first_sharded
from lightning_par.tensor.sharded import ShardedTensor

_HEADS = -3


@rule_for(functional.scaled_dot_product_attention)
def attention(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each rank attends with its own heads: no communication."""
    return _attention(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ShardedTensor:
    lead = first_sharded((query, key, value))
    from_right, segments, axis = lead.shard_dim - lead.ndim, lead.segments, lead.axis
    if from_right > _HEADS:
        raise NoRule
    if enable_gqa and from_right == _HEADS and query.shape[_HEADS] != key.shape[_HEADS]:
        local_query, local_key, local_value = _grouped(query, key, value)
        segments = (query.shape[_HEADS],)
        enable_gqa = local_query.shape[_HEADS] != local_key.shape[_HEADS]
    else:
        local_query, local_key, local_value = (aligned_part(x, from_right, segments, axis) for x in (query, key, value))
    mask = aligned_part(attn_mask, from_right, segments, axis)
    options = {"attn_mask": mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if dropout_p > 0.0:
        with sharded_stream(axis, lead.device):
            result = functional.scaled_dot_product_attention(local_query, local_key, local_value, dropout_p=dropout_p, **options)
    else:
        result = functional.scaled_dot_product_attention(local_query, local_key, local_value, **options)
    return ShardedTensor(result, from_right + result.dim(), segments, axis)


def _grouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """Local query, key and value heads, where several query heads in a row share one key head.

    Cut alike, a rank's query heads belong to its key heads, and so they do where several ranks hold one key head. Replicated
    key heads are repeated to one per query head and scattered. Heads that do not divide are not cut at the borders of groups.
    """
    lead = first_sharded((query, key, value))
    heads = query.shape[_HEADS]
    if isinstance(key, ShardedTensor) != isinstance(value, ShardedTensor) or any(
        isinstance(x, ShardedTensor) and x.is_padded for x in (query, key)
    ):
        raise NoRule
    if not isinstance(key, ShardedTensor):
        key, value = (x.repeat_interleave(heads // x.shape[_HEADS], _HEADS) for x in (key, value))
    return [_heads_of(x, heads, lead.axis) for x in (query, key, value)]


def _heads_of(x: torch.Tensor, heads: int, axis: Axis) -> torch.Tensor:
    """This rank's part of query, key or value heads, which ``heads`` query heads attend with."""
    if isinstance(x, ShardedTensor) and x.axis.copies > axis.copies:
        if x.shard_dim == x.ndim + _HEADS and x.shape[_HEADS] == x.axis.size:
            return x.local  # one head
        x = x.repeat_interleave(heads // x.shape[_HEADS], _HEADS)
    return aligned_part(x, _HEADS, (x.shape[_HEADS],), axis)
