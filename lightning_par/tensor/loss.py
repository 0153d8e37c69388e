"""Cross entropy on logits that are cut along the vocabulary (arXiv 1909.08053, section 3).

No rank ever sees all logits of a token: two small all-reduces forward, none backward.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_par.runtime.axis import Axis
from lightning_par.tensor.along_cut import local_maximum
from lightning_par.tensor.ghost import num_real
from lightning_par.tensor.vocabulary import local_rows


def vocabulary_parallel_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    axis: Axis,
    *,
    vocabulary: int,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy` of class indices. Collective over the axis.

    Computed in fp32 (fp64 for fp64 logits); the result has the dtype that torch gives, which is fp32 under autocast.

    Args:
        logits: the local part ``[..., V / tp]``, rounded up; what is beyond the vocabulary counts for nothing.
        target: class indices ``[...]``, the same on every rank, from 0 to V - 1, or ``ignore_index``.
        axis: the tp axis.
        vocabulary: V.
        weight: weights of all classes ``[V]``, or none.
        ignore_index: targets that count for nothing.
        reduction: ``mean``, ``sum`` or ``none``.
        label_smoothing: from 0 to 1.

    Returns:
        A scalar, or ``[...]`` for ``none``.
    """
    rows = logits.shape[-1]
    flat, labels = logits.reshape(-1, rows), target.reshape(-1)
    counted = labels != ignore_index
    labels = labels.masked_fill(~counted, 0)
    token_weight = counted.to(torch.promote_types(logits.dtype, torch.float32))
    local_weight = None
    if weight is not None:
        local_weight = weight[axis.coordinate * rows : (axis.coordinate + 1) * rows].to(token_weight)
        token_weight = token_weight * weight.to(token_weight)[labels]
    smooth = label_smoothing / vocabulary * counted
    losses = _CrossEntropy.apply(
        flat, labels, axis, vocabulary, (1 - label_smoothing) * token_weight, smooth, local_weight, label_smoothing > 0
    )
    losses = losses.masked_fill(~counted, 0)  # 0 and not nan where the loss of an ignored token is infinite
    result = reduced(losses.view(target.shape), token_weight.sum(), reduction)
    return result if torch.is_autocast_enabled(logits.device.type) else result.to(logits.dtype)


def reduced(losses: torch.Tensor, total_weight: torch.Tensor | float, reduction: str) -> torch.Tensor:
    """Losses as ``reduction`` says: ``mean`` is their sum over ``total_weight``."""
    if reduction == "none":
        return losses
    if reduction == "mean":
        return losses.sum() / total_weight
    if reduction == "sum":
        return losses.sum()
    raise ValueError(f"{reduction} is not a valid value for reduction")


class _CrossEntropy(torch.autograd.Function):
    """The loss of every token, with z = log(sum_c exp(x_c)):

    loss   = a (z - x_y) + b sum_c w_c (z - x_c)
    d/dx_c = (a + b sum_c w_c) softmax(x)_c - a [c = y] - b w_c

    where a is the weight of the token, b its smoothing and w the class weights (1 if there are none).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        axis: Axis,
        vocabulary: int,
        token_weight: torch.Tensor,
        smooth: torch.Tensor,
        class_weight: torch.Tensor | None,
        smooths: bool,
    ) -> torch.Tensor:
        tokens, rows = logits.shape
        count = num_real(vocabulary, axis)
        index, elsewhere = local_rows(labels, rows, axis.coordinate, vocabulary)
        x = logits[:, :count].to(token_weight.dtype)
        top = local_maximum(x, 1)
        axis.all_reduce(top, "max")
        x = x - top
        mine = (logits.gather(-1, index.unsqueeze(-1)).to(x.dtype) - top).squeeze(-1).masked_fill(elsewhere, 0)
        sums = [x.exp().sum(-1), mine]
        if smooths:
            weighted, total = (
                (x, torch.full_like(mine, count)) if class_weight is None else (x * class_weight, class_weight.sum().expand(tokens))
            )
            sums += [weighted.sum(-1), total]
        stacked = torch.stack(sums)
        axis.all_reduce(stacked)
        z = stacked[0].log()  # of the logits less their maximum
        losses = token_weight * (z - stacked[1])
        total_weight = None
        if smooths:
            total_weight = stacked[3]
            losses = losses + smooth * (total_weight * z - stacked[2])
        ctx.count = count
        ctx.save_for_backward(logits, top.squeeze(-1) + z, index, elsewhere, token_weight, smooth, class_weight, total_weight)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, z, index, elsewhere, token_weight, smooth, class_weight, total_weight = ctx.saved_tensors
        a, b = grad * token_weight, grad * smooth
        scale = a if total_weight is None else a + b * total_weight
        result = (logits.to(z.dtype) - z.unsqueeze(-1)).exp_().mul_(scale.unsqueeze(-1))
        result.scatter_add_(-1, index.unsqueeze(-1), -a.masked_fill(elsewhere, 0).unsqueeze(-1))
        if total_weight is not None:
            result[:, : ctx.count] -= b.unsqueeze(-1) * (1 if class_weight is None else class_weight)
        result[:, ctx.count :] = 0  # or padded rows of the head would be trained
        return (result.to(logits.dtype), *(None,) * 7)
