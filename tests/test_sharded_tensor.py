"""Every rule gives the values and the gradients that plain torch gives on the whole tensor."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightning_par.errors import ModelError
from lightning_par.private.torch import FakeTensorMode
from lightning_par.runtime.axis import Axis, LocalAxis
from lightning_par.runtime.parameter import Split
from lightning_par.tensor import ShardedTensor
from lightning_par.tensor.ghost import shielded
from lightning_par.tensor.registry import RULES, NoRule
from lightning_par.tensor.rules.pointwise import in_place, pointwise
from lightning_par.tensor.rules.segment import resolve_shape, take_segments, view_cut
from tests.axes import tp_axis
from tests.ranks import run_ranks

B, T, D = 2, 3, 5
EVEN, UNEVEN = (12, 24), (11, 25)  # heads and classes: they divide by 2 and 3 ranks, or by neither


@dataclass(frozen=True)
class Case:
    """A function on tensors, run whole and sharded.

    Attributes:
        name: what it shows.
        function: called with one tensor per input.
        inputs: shapes, and how each is cut: ``(shape, dim)``, ``(shape, Split)`` or ``(shape, None)`` for replicated.
        result: the dim in which the (first) result is cut, None for replicated.
        gathers: functions that are expected to gather.
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[tuple[tuple[int, ...], Any], ...]
    result: int | None
    gathers: tuple[str, ...] = ()


def whole(*shape: int) -> tuple[tuple[int, ...], None]:
    return shape, None


def causal() -> torch.Tensor:
    return torch.tril(torch.ones(T, T)).view(1, 1, T, T)


def nanogpt(x: torch.Tensor) -> torch.Tensor:
    C = x.size(2) // 3
    H = C // D
    q, k, v = x.split(C, dim=2)
    q, k, v = (t.view(B, T, H, C // H).transpose(1, 2) for t in (q, k, v))
    att = (q @ k.transpose(-2, -1)) * (1.0 / D**0.5)
    att = F.softmax(att.masked_fill(causal() == 0, float("-inf")), dim=-1)
    return (F.dropout(att, 0.0) @ v).transpose(1, 2).contiguous().view(B, T, C)


def unbound(x: torch.Tensor) -> torch.Tensor:
    q, k, v = x.view(B, T, 3, x.size(2) // (3 * D), D).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)


def gpt2_eager(x: torch.Tensor) -> torch.Tensor:
    q, k, v = x.chunk(3, dim=2)
    shape = (*q.shape[:-1], -1, D)
    q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))
    weights = torch.matmul(q, k.transpose(-1, -2)) * 0.3 + torch.zeros(B, 1, T, T)
    weights = F.softmax(weights, dim=-1).type(v.dtype)
    y = torch.matmul(weights, v).transpose(1, 2)
    return y.reshape(*y.shape[:-2], -1).contiguous()


def gpt2_reordered(x: torch.Tensor) -> torch.Tensor:
    H = x.size(2) // (3 * D)
    q, k, v = (t.view(B, T, H, D).transpose(1, 2) for t in x.chunk(3, dim=2))
    start = torch.empty(B * H, T, T)
    q, k = q.reshape(-1, T, D), k.transpose(-1, -2).reshape(-1, D, T)
    scores = torch.baddbmm(start, q.double(), k.double(), beta=0, alpha=0.5).reshape(B, H, T, T)
    return scores.softmax(-1).type(v.dtype) @ v


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotary(x: torch.Tensor) -> torch.Tensor:
    angle = torch.arange(T * 4.0).view(1, 1, T, 4)
    return x * angle.cos() + rotate_half(x) * angle.sin()


def rotary_pairs(x: torch.Tensor) -> torch.Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * 0.6 - b * 0.8, a * 0.8 + b * 0.6), dim=-1).flatten(-2)


def rotary_complex(x: torch.Tensor) -> torch.Tensor:
    turn = torch.polar(torch.ones(T, 2), torch.arange(T * 2.0).view(T, 2))
    z = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * turn).flatten(3).type_as(x)


def repeat_kv(x: torch.Tensor) -> torch.Tensor:
    b, heads, t, d = x.shape
    return x[:, :, None, :, :].expand(b, heads, 3, t, d).reshape(b, heads * 3, t, d)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def added_in_place(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x * 1
    z += y
    z.mul_(2.0)
    return z


def assigned(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x * 1
    z[:, :, 1] = y
    return z


def sorted_in_place(x: torch.Tensor) -> torch.Tensor:
    z = x * 1
    z.index_fill_(1, torch.tensor([0, x.size(1) - 1]), 0.5)
    return z


def cases(H: int, V: int) -> list[Case]:
    """The table, for so many heads and classes. What is expected to gather is that of heads and classes that divide."""
    C = H * D
    QKV = ((B, T, 3 * C), Split(2, (C, C, C)))
    FLAT, HEADS, HEADS_LAST, LOGITS = ((B, T, C), 2), ((B, H, T, D), 1), ((B, T, H, D), 2), ((B, T, V), 2)
    TOKENS = ((B, H, D), 1)
    return [
        Case("nanoGPT attention", nanogpt, (QKV,), 2),
        Case("fused view and unbind", unbound, (QKV,), 2),
        Case("transformers GPT-2 eager", gpt2_eager, (QKV,), 2),
        Case("transformers GPT-2 reordered", gpt2_reordered, (QKV,), 1),
        Case("fused reshape, index on the fused dim", lambda x: x.reshape(B, T, 3, H, D)[:, :, 1], (QKV,), 2),
        Case("fused reshape, chunk on the fused dim", lambda x: x.reshape(B, T, 3, H, D).chunk(3, 2)[2].squeeze(2), (QKV,), 2),
        Case("view of fused and back", lambda x: x.view(B, T, 3, H, D).flatten(2), (QKV,), 2),
        Case("view by rows of a segment", lambda x: x.view(B, T, 3 * H, D), (QKV,), 2),
        Case("fused unflatten", lambda x: x.unflatten(-1, (3, -1, D)), (QKV,), 3),
        Case("slice of a segment", lambda x: x[..., C : 2 * C], (QKV,), 2),
        Case("slice of two segments", lambda x: x[..., :-C], (QKV,), 2),
        Case("narrow to a segment", lambda x: x.narrow(-1, C, C), (QKV,), 2),
        Case("chunk along segments", lambda x: x.chunk(3, -1), (QKV,), 2),
        Case("uneven split along segments", lambda x: x.split([2 * C, C], -1), (QKV,), 2),
        Case("split with other sizes", lambda x: x.split([C + 1, 2 * C - 1], -1), (QKV,), None, ("split",)),
        Case("slice within a segment", lambda x: x[..., :7], (QKV,), None, ("__getitem__",)),
        Case("glu of segments", lambda x: F.glu(x, -1), (((B, T, 2 * C), Split(2, (C, C))),), 2),
        Case("grouped query segments as heads", lambda x: x.view(B, T, -1, D), (((B, T, 4 * C), Split(2, (2 * C, C, C))),), 2),
        Case("heads", lambda x: x.view(B, T, H, D).transpose(1, 2), (FLAT,), 1),
        Case("heads by unflatten", lambda x: torch.unflatten(x, 2, (H, D)).swapaxes(1, 2), (FLAT,), 1),
        Case("heads into the batch and back", lambda x: (x.reshape(B * H, T, D) * 2).view(B, H, T, D), (HEADS,), 1),
        Case("batch and time flattened", lambda x: x.view(-1, x.size(-1)), (LOGITS,), 1),
        Case("view on an inner dim", lambda x: x.view(B, T, D, H), (FLAT,), None, ("view",)),
        Case("view_as and reshape_as", lambda x, y: x.reshape_as(y), (FLAT, whole(B, T, H, D)), 2),
        Case("permute by list", lambda x: x.permute([0, 2, 1, 3]), (HEADS,), 2),
        Case("movedim", lambda x: x.movedim(1, 3), (HEADS,), 3),
        Case("movedim of two", lambda x: torch.movedim(x, (0, 1), (2, 0)), (HEADS,), 0),
        Case("transpose by name", lambda x: x.transpose(dim0=1, dim1=2), (HEADS,), 2),
        Case("vector norm", lambda x: torch.linalg.vector_norm(x, dim=-1), (HEADS,), 1),
        Case("concatenation with an empty cache", lambda x: torch.cat([torch.tensor([]), x], -2), (HEADS,), 1),
        Case("transposed matrices", lambda x: x[0].mT, (HEADS,), 0),
        Case("reversed dims", lambda x: x[0, 0].T, (HEADS_LAST,), 1),
        Case("unsqueeze and squeeze", lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze(1).squeeze(), (HEADS,), 1),
        Case("expand", lambda x: x[:, :, None].expand(-1, -1, 4, T, D), (HEADS,), 1),
        Case("expand with a new dim", lambda x: x[0].expand(4, H, T, D), (HEADS,), 1),
        Case("repeat of the cut dim", lambda x: x.repeat(1, 2, 1, 3), (HEADS,), 1),
        Case("repeat_kv", repeat_kv, (HEADS,), 1),
        Case("repeat_interleave of heads", lambda x: x.repeat_interleave(2, dim=1), (HEADS,), 1),
        Case("unbind of another dim", lambda x: x.unbind(0)[1], (HEADS,), 0),
        Case("iteration", lambda x: [row * 2 for row in x], (HEADS,), 0),
        Case("concatenation along another dim", lambda x, y: torch.cat([x, y], -2), (HEADS, HEADS), 1),
        Case("concatenation with a whole tensor", lambda x, y: torch.cat([x, y], dim=2), (HEADS, whole(B, H, 2, D)), 1),
        Case("concatenation along the cut dim", lambda x, y: torch.cat((x, y), -1), (FLAT, LOGITS), 2),
        Case("stack", lambda x, y: torch.stack([x, y]), (HEADS, HEADS), 2),
        Case("integer, None and ellipsis", lambda x: x[0, ..., None, 1:], (HEADS,), 0),
        Case("index tensor", lambda x: x[:, :, torch.tensor([[0, 2], [1, 1]])], (HEADS,), 1),
        Case("index_select", lambda x: x.index_select(2, torch.tensor([2, 0])), (HEADS,), 1),
        Case("gather along another dim", lambda x: x.gather(2, torch.zeros(B, H, 1, D, dtype=torch.long)), (HEADS,), 1),
        Case("index on the cut dim", lambda x: x[:, 1], (HEADS,), None, ("__getitem__",)),
        Case("boolean mask", lambda x: x[torch.tensor([True, False])], (HEADS,), None, ("__getitem__",)),
        Case("triangle", lambda x: x.tril(), (HEADS,), 1),
        Case("item assignment", assigned, (HEADS, ((B, H, D), 1)), 1),
        Case("item assignment of a whole tensor", assigned, (HEADS, whole(B, H, D)), 1),
        Case("in place", added_in_place, (HEADS, whole(H, 1, 1)), 1),
        Case("in place without a rule", sorted_in_place, (HEADS,), 1, ("index_fill_",)),
        Case("rotary halves", rotary, (((B, H, T, 4), 1),), 1),
        Case("rotary pairs", rotary_pairs, (((B, H, T, 4), 1),), 1),
        Case("rotary complex", rotary_complex, (((B, H, T, 4), 1),), 1),
        Case("gate", lambda x, y: F.silu(x) * y, (FLAT, FLAT), 2),
        Case("whole tensor with one element there", lambda x, y: x * y, (HEADS, whole(B, 1, T, 1)), 1),
        Case("whole tensor of full size there", lambda x, y: y - x, (HEADS, whole(H, 1, 1)), 1),
        Case("whole tensor without the dim", lambda x, y: x / (y.exp()), (HEADS, whole(T, D)), 1),
        Case("whole tensor with more dims", lambda x, y: x + y, (((H, 1, D), 0), whole(B, H, T, D)), 1),
        Case("scalar tensor", lambda x, y: x * y, (HEADS, whole()), 1),
        Case("cut in other dims", lambda x, y: x + y, (HEADS, ((B, H, T, D), 1)), 1),
        Case("cut differently", lambda x, y: x + y, (((B, H, H), 1), ((B, H, H), 2)), None, ("add", "add")),
        Case("where", lambda x, y: torch.where(causal().bool(), x @ x.mT, y), (HEADS, whole(1)), 1),
        Case("clamp and comparison", lambda x: x.clamp(min=0) * (x > 0.1), (HEADS,), 1),
        Case("casts", lambda x, y: x.double().to(torch.float64).type_as(y).to(y), (HEADS, HEADS), 1),
        Case("maximum of two", lambda x, y: torch.max(x, y), (HEADS, HEADS), 1),
        Case("maximum along another dim", lambda x: x.max(-1).values, (HEADS,), 1),
        Case("minimum along the cut dim", lambda x: x.min(1).values, (HEADS,), None, ("min",)),
        Case("sum over earlier dims", lambda x: x.sum((0, 2)), (HEADS,), 0),
        Case("sum over the cut dim", lambda x: x.sum(1), (HEADS,), None),
        Case("mean of all", lambda x: x.mean(), (HEADS,), None),
        Case("mean over the cut dim, used on the parts", lambda x: x - x.mean(-1, keepdim=True), (FLAT,), 2),
        Case("rms norm of all heads, written out", rms, (FLAT, whole(C)), 2),
        Case("rms norm of a head, written out", rms, (HEADS, whole(D)), 1),
        Case("layer_norm of a head", lambda x, w, b: F.layer_norm(x, (D,), w, b), (HEADS, whole(D), whole(D)), 1),
        Case("rms_norm of a head", lambda x, w: F.rms_norm(x, (D,), weight=w), (HEADS, whole(D)), 1),
        Case("layer_norm of all heads", lambda x: F.layer_norm(x, (C,)), (FLAT,), None, ("layer_norm",)),
        Case("normalize", lambda x: F.normalize(x, dim=-1), (HEADS,), 1),
        Case("cumsum and flip", lambda x: x.cumsum(2).flip(-1), (HEADS,), 1),
        Case("topk", lambda x: x.topk(2, -1)[0], (HEADS,), 1),
        Case("variance", lambda x: x.var(-1, unbiased=False), (HEADS,), 1),
        Case("norm", lambda x: x.norm(dim=-1, keepdim=True), (HEADS,), 1),
        Case("linear on a head", lambda x, w, b: F.linear(x, w, b), (HEADS, whole(7, D), whole(7)), 1),
        Case("linear that contracts the cut dim", lambda x, w, b: F.linear(x, w, b), (FLAT, whole(7, C), whole(7)), None),
        Case("matmul with a whole matrix", lambda x, y: x @ y, (HEADS, whole(D, 4)), 1),
        Case("whole matrix matmul", lambda x, y: y @ x, (HEADS, whole(4, T)), 1),
        Case("matmul with whole batched", lambda x, y: x @ y, (HEADS, whole(B, H, D, 2)), 1),
        Case("matmul with whole shared by heads", lambda x, y: x @ y, (HEADS, whole(B, 1, D, 2)), 1),
        Case("matmul cut in columns", lambda x, y: y @ x, (((B, D, C), 2), whole(4, D)), 2),
        Case("matmul that contracts", lambda x, y: x @ y.mT, (FLAT, FLAT), None),
        Case("matmul with a vector", lambda x, y: x @ y, (HEADS, whole(D)), 1),
        Case("bmm", lambda x, y: torch.bmm(x[0], y[0]), (HEADS, ((B, H, D, T), 1)), 0),
        Case("addmm", lambda b, x, w: torch.addmm(b, x, w), (whole(C), whole(T, D), ((D, C), 1)), 1),
        Case("einsum over heads", lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k), (HEADS, HEADS), 1),
        Case("einsum with a whole tensor", lambda x, w: torch.einsum("bthd, hde -> bthe", x, w), (HEADS_LAST, whole(H, D, 2)), 2),
        Case("einsum that contracts", lambda x, w: torch.einsum("bthd,hde->bte", x, w), (HEADS_LAST, whole(H, D, 2)), None),
        Case("einsum with an ellipsis", lambda x, w: torch.einsum("...d,de->...e", x, w), (HEADS, whole(D, 2)), None, ("einsum",)),
        Case("attention with a mask", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, causal().bool()), (HEADS,) * 3, 1),
        Case(
            "attention with a bias per head",
            lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=0.2),
            (HEADS, HEADS, HEADS, whole(1, H, T, T)),
            1,
        ),
        Case(
            "attention with groups",
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            (((B, 2 * H, T, D), 1), HEADS, HEADS),
            1,
        ),
        Case(
            "attention with whole groups",
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            (HEADS, whole(B, 1, T, D), whole(B, 1, T, D)),
            1,
        ),
        Case("zeros like", lambda x: x + torch.zeros_like(x) + x.new_ones(B, 1, T, D), (HEADS,), 1),
        Case("padding of another dim", lambda x: F.pad(x, (1, 0, 2, 1)), (HEADS,), 1),
        Case("padding of the cut dim", lambda x: F.pad(x, (1, 1)), (FLAT,), None, ("pad",)),
        Case(
            "norm and linear of a cut sequence",
            lambda x, w, m: F.linear(F.layer_norm(x, (D,), w), m),
            (TOKENS, whole(D), whole(4, D)),
            1,
        ),
        Case("mean of a cut sequence", lambda x, w: (x.log().nan_to_num() * w).mean(1), (TOKENS, whole(D)), None),
        Case("all but the last of a cut sequence", lambda x: x[:, :-1], (TOKENS,), None, ("__getitem__",)),
        Case("cumulative sum along the cut dim", lambda x: x.cumsum(1), (TOKENS,), None, ("cumsum",)),
        Case("roll along the cut dim", lambda x: torch.roll(x, 1, 1), (TOKENS,), None, ("roll",)),
        Case("flip of the cut dim", lambda x: x.flip(1), (TOKENS,), None, ("flip",)),
        Case("deviation along the cut dim", lambda x: x.std(1), (TOKENS,), None, ("std",)),
        Case("norm along the cut dim", lambda x: x.norm(dim=1), (TOKENS,), None, ("norm",)),
        Case("product of all", lambda x: x.prod(), (TOKENS,), None, ("prod",)),
        Case("sorted along the cut dim", lambda x: x.sort(1)[0], (TOKENS,), None, ("sort",)),
        Case("any along the cut dim", lambda x: (x > 1).any(1) + x.sum(1), (TOKENS,), None, ("any",)),
        Case("all of all", lambda x: torch.isfinite(x).all() * x, (TOKENS,), 1, ("all",)),
        Case("integer division", lambda x: 7 // (x.detach() * 0 + 2).long() * x, (TOKENS,), 1),
        Case("index computed from a cut one", lambda x: x.gather(2, (x.detach() > 0).long() + 1), (TOKENS,), 1),
        Case("filled in place", lambda x: (x * 1).fill_(2.0).sum() + x.sum(), (TOKENS,), None),
        Case("a function without a rule", lambda x: torch.diff(x), (HEADS,), None, ("diff",)),
        Case(
            "a whole tensor shaped like a cut one",
            lambda x, y: x.view_as(y).expand_as(y),
            (whole(B, T, C), ((B, T, H, D), 2)),
            None,
        ),
        Case(
            "nested arguments",
            lambda x, y: torch.block_diag(*[x[0, 0], y[0, 0]]),
            (HEADS_LAST, HEADS_LAST),
            None,
            ("block_diag",) * 2,
        ),
    ]


def class_cases(V: int) -> list[Case]:
    """Functions along cut classes, which gather in no case."""
    LOGITS, ROWS, COLUMNS, OTHER = ((B, T, V), 2), ((B * T, V), 1), ((B, V, T), 1), ((V, B), 0)
    labels = torch.arange(B * T) * 5 % V
    there = labels.view(B, T)
    log_weights = torch.linspace(-2, 0, V)
    return [
        Case("log_softmax", lambda x: F.log_softmax(x, -1), (LOGITS,), 2),
        Case("log_softmax of another dim", lambda x: x.log_softmax(1), (COLUMNS,), 1),
        Case("log_softmax of large logits", lambda x: (x * 1e4).log_softmax(-1), (LOGITS,), 2),
        Case("softmax", lambda x: x.softmax(dim=-1), (LOGITS,), 2),
        Case("softmax with a dtype", lambda x: torch.softmax(x.float(), 0, torch.float64), (OTHER,), 0),
        Case("softmax of a temperature that is trained", lambda x, t: F.softmax(x / t.exp(), -1), (LOGITS, whole()), 2),
        Case("entropy", lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1), (LOGITS,), None),
        Case("logarithm of probabilities", lambda x: x.softmax(-1).log().mean(-1), (LOGITS,), None),
        Case("logsumexp", lambda x: torch.logsumexp(x, -1).pow(2).mean(), (LOGITS,), None),
        Case("logsumexp that keeps the dim", lambda x: x - x.logsumexp((1,), keepdim=True), (COLUMNS,), 1),
        Case("logsumexp by hand", lambda x: (x - x.max(-1, True)[0]).exp().sum(-1).log(), (LOGITS,), None),
        Case("soft capping", lambda x: torch.tanh(x / 30.0) * 30.0, (LOGITS,), 2),
        Case("label smoothing by hand", lambda x: -x.log_softmax(-1).mean(-1), (LOGITS,), None),
        Case("argmax", lambda x: x.argmax(-1).double() * x.sum(-1), (LOGITS,), None),
        Case("argmax that keeps the dim", lambda x: x.argmax(1, keepdim=True) + x.sum(1, keepdim=True), (COLUMNS,), None),
        Case("accuracy", lambda x: (x.argmax(-1) == there).double().mean() + x.mean(), (LOGITS,), None),
        Case("max", lambda x: [x.max(-1).values, x.max(-1).indices.double()], (LOGITS,), None),
        Case("max that keeps the dim", lambda x: torch.max(x, dim=1, keepdim=True)[0], (COLUMNS,), None),
        Case("topk", lambda x: [x.topk(5, -1).values, torch.topk(x, 5).indices.double()], (LOGITS,), None),
        Case("topk of most", lambda x: x.topk(V - 1, dim=1)[0], (COLUMNS,), None),
        Case("topk where little is finite", lambda x: x.masked_fill(x > -9, -torch.inf).topk(3, -1)[0].exp(), (LOGITS,), None),
        Case(
            "top-3 accuracy", lambda x: (x.topk(3).indices == there[..., None]).any(-1).double().mean() + x.mean(), (LOGITS,), None
        ),
        Case("gather of labels", lambda x: x.log_softmax(-1).gather(-1, there.unsqueeze(-1)).squeeze(-1), (LOGITS,), None),
        Case("gather of some rows", lambda x: x.gather(1, labels[:4].view(4, 1) * torch.tensor([1, 0])), (ROWS,), None),
        Case("take_along_dim", lambda x: torch.take_along_dim(x, labels[:, None], 1), (ROWS,), None),
        Case("elements", lambda x: x[torch.arange(B * T), labels], (ROWS,), None),
        Case("elements counted from the end", lambda x: x[torch.tensor([0, 3]), torch.tensor([-1, -V])], (ROWS,), None),
        Case("cross_entropy", lambda x: F.cross_entropy(x.view(-1, V), labels), (LOGITS,), None),
        Case(
            "cross_entropy of shifted logits",
            lambda x: F.cross_entropy(x[..., :-1, :].contiguous().view(-1, V).float(), there[:, 1:].reshape(-1)).double(),
            (LOGITS,),
            None,
        ),
        Case("cross_entropy, classes second", lambda x: F.cross_entropy(x.transpose(1, 2), there), (LOGITS,), None),
        Case("cross_entropy with a bias", lambda x, b: F.cross_entropy((x + b).flatten(0, 1), labels), (LOGITS, whole(V)), None),
        Case("nll_loss", lambda x: F.nll_loss(F.log_softmax(x, -1), labels).exp(), (ROWS,), None),
        Case("cross_entropy of probabilities", lambda x, y: F.cross_entropy(x, y.softmax(1)), (ROWS, whole(B * T, V)), None),
        Case(
            "kl_div",
            lambda x, y: F.kl_div(x.log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="batchmean"),
            (ROWS, whole(B * T, V)),
            None,
        ),
        Case(
            "kl_div of a whole target", lambda x: F.kl_div(x.log_softmax(-1), log_weights.exp(), reduction="sum"), (LOGITS,), None
        ),
        Case("mse_loss", lambda x, y: F.mse_loss(x, y), (LOGITS, whole(B, T, V)), None),
        Case("mse_loss of every element", lambda x, y: F.mse_loss(x, y, reduction="none"), (LOGITS, LOGITS), 2),
        Case(
            "binary cross entropy",
            lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid(), pos_weight=log_weights.exp()),
            (LOGITS, whole(B, T, V)),
            None,
        ),
    ]


def as_split(shape: tuple[int, ...], cut: Any) -> Split | None:
    return Split(cut, (shape[cut],)) if isinstance(cut, int) else cut


def outputs(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def loss_of(results: list[torch.Tensor]) -> torch.Tensor:
    """A scalar whose gradient differs from element to element."""
    return sum((r * torch.linspace(-1, 1, r.numel()).to(r.dtype).view(r.shape)).sum() for r in results)  # type: ignore[return-value]


def part_with_ghosts(full: torch.Tensor, split: Split, axis: Axis) -> torch.Tensor:
    """This rank's part; what is beyond the whole tensor is undefined, so that it shows wherever it gets to."""
    part = split.shard(full, axis.size, axis.coordinate)
    return part.masked_fill(split.shard(torch.ones_like(full), axis.size, axis.coordinate) == 0, torch.nan)


def check_case(case: Case, axis: Axis, is_placed: bool) -> None:
    """Values and gradients; where ``is_placed``, also how the result is cut and what gathers."""
    generator = torch.Generator().manual_seed(1)
    fulls = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape, _ in case.inputs]
    splits = [as_split(*spec) for spec in case.inputs]
    torch.set_default_dtype(torch.float64)
    try:
        expected = outputs(case.function(*fulls))
        gradients = torch.autograd.grad(loss_of(expected), fulls, allow_unused=True)
        leaves, given = [], []
        for full, split in zip(fulls, splits, strict=True):
            data = full.detach()
            leaf = (data.clone() if split is None else part_with_ghosts(data, split, axis)).requires_grad_()
            leaves.append(leaf)
            given.append(leaf if split is None else ShardedTensor(shielded(leaf, split, axis), split.dim, split.segments, axis))
        axis.gathers.clear()
        results = outputs(case.function(*given))
        if is_placed:
            assert sorted(axis.gathers.elements()) == sorted(case.gathers)
            first = results[0]
            assert (first.shard_dim if isinstance(first, ShardedTensor) else None) == case.result
        full_results = [r.full_tensor() if isinstance(r, ShardedTensor) else r for r in results]
        for result, full_result, want in zip(results, full_results, expected, strict=True):
            assert result.shape == want.shape
            torch.testing.assert_close(full_result, want)
        loss_of(full_results).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    for leaf, split, want in zip(leaves, splits, gradients, strict=True):
        if want is not None:
            torch.testing.assert_close(leaf.grad, want if split is None else split.shard(want, axis.size, axis.coordinate))


def run_cases(rank: int, size: int, sizes: tuple[int, int]) -> dict[str, str]:
    axis, failures = tp_axis(), {}
    table = [(case, sizes == EVEN) for case in cases(*sizes)] + [(case, True) for case in class_cases(sizes[1])]
    for case, is_placed in table:
        try:
            check_case(case, axis, is_placed)
        except Exception as error:  # collected, so that one start shows all
            failures[case.name] = f"{type(error).__name__}: {error}"
    return failures


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("sizes", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_every_case_equals_plain_torch(size: int, sizes: tuple[int, int]) -> None:
    assert run_ranks(run_cases, size, sizes) == [{}] * size


def test_ranks_that_hold_nothing_but_ghosts() -> None:
    assert run_ranks(run_cases, 4, (2, 9)) == [{}] * 4  # the last of four ranks holds no head and no class


def pointwise_functions() -> list[Callable[..., Any]]:
    return [function for function, rule in RULES.items() if rule in (pointwise, in_place) and function.__name__ != "cuda"]


def call_on(function: Callable[..., Any], *tensors: torch.Tensor) -> torch.Tensor | None:
    """``function`` on as many of the tensors as it takes; None if it takes other arguments."""
    for count in (1, 2, 3):
        try:
            result = function(*tensors[:count])
        except (TypeError, RuntimeError, NotImplementedError):
            continue
        return result if isinstance(result, torch.Tensor) else None
    return None


def test_every_pointwise_function_of_the_table() -> None:
    """Part of the result is the result of the part; one process can play every rank since nothing communicates."""
    checked = 0
    for function in pointwise_functions():
        for dtype in (torch.float64, torch.bool, torch.int64):
            lowest = 0.1 if dtype.is_floating_point else 0.4  # integers must not be 0, they divide
            x, y, z = ((torch.rand(B, 12, T) * 0.8 + lowest).mul(2.5).to(dtype) for _ in range(3))
            expected = call_on(function, x.clone(), y, z)
            if expected is None or expected.shape != x.shape:
                continue
            axis = LocalAxis("tp", 3, 1)
            sharded = [ShardedTensor(t.chunk(3, 1)[1].clone(), 1, (12,), axis) for t in (x, y, z)]
            result = call_on(function, *sharded)
            assert isinstance(result, ShardedTensor) and not axis.gathers, function
            if "empty" not in function.__name__:
                torch.testing.assert_close(result.local, expected.chunk(3, 1)[1], equal_nan=True)
            checked += 1
    assert checked > 250


def dropped(rank: int, size: int) -> dict[str, Any]:
    axis = tp_axis()
    results: dict[str, Any] = {}
    x = ShardedTensor(torch.ones(4, 50), 1, (50 * size,), axis)
    torch.manual_seed(5)
    results["masks"] = [F.dropout(x, 0.5).local.numpy(), F.dropout(x, 0.5).local.numpy()]
    heads = ShardedTensor(torch.ones(1, 2, 8, 4), 1, (2 * size,), axis)
    results["attention"] = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5).local.numpy()
    results["normal"] = torch.randn_like(x).local.numpy()
    results["afterwards"] = torch.rand(3).numpy()
    results["replicated"] = F.dropout(torch.ones(50), 0.5).numpy()
    torch.manual_seed(5)
    results["again"] = F.dropout(x, 0.5).local.numpy()
    assert F.dropout(x, 0.5, training=False) is x
    return results


def test_random_numbers_differ_on_parts_and_stay_equal_elsewhere() -> None:
    first, second = run_ranks(dropped, 2)
    for name in ("attention", "normal"):
        assert (first[name] != second[name]).any()
    assert (first["masks"][0] != second["masks"][0]).any() and (first["masks"][0] != first["masks"][1]).any()
    for name in ("afterwards", "replicated"):
        assert (first[name] == second[name]).all()
    for results in (first, second):
        assert (results["again"] == results["masks"][0]).all()  # the same state draws the same mask: recomputation is safe


class Recorder(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_fake_tensors_on_a_silent_axis_under_a_function_mode() -> None:
    axis = LocalAxis("tp", 4, 3)
    with FakeTensorMode(), Recorder() as recorder:
        C = 12 * D
        local = torch.empty(B, T, 3 * C // 4, requires_grad=True)
        x = ShardedTensor(local, 2, (C, C, C), axis)
        y = F.dropout(unbound(x), 0.1)
        assert isinstance(y, ShardedTensor) and y.shape == (B, T, C) and y.local.shape == (B, T, C // 4)
        y.full_tensor().sum().backward()
        F.cross_entropy(ShardedTensor(local, 2, (3 * C,), axis).view(-1, 3 * C), torch.empty(B * T, dtype=torch.long)).backward()
        assert local.grad is not None and local.grad.shape == local.shape
    assert "scaled_dot_product_attention" in recorder.names and not axis.gathers


def test_shows_the_global_tensor() -> None:
    axis = LocalAxis("tp", 2, 0)
    local = torch.ones(3, 4, requires_grad=True)
    x = ShardedTensor(local, 1, (8,), axis)
    assert x.shape == x.size() == (3, 8) and x.size(-1) == 8 and x.dim() == x.ndim == 2 and x.numel() == 24 and len(x) == 3
    assert x.dtype == torch.float32 and x.device.type == "cpu" and x.is_floating_point() and not x.is_cuda and x.is_leaf
    assert x.requires_grad and x.grad_fn is None and (x * 2).grad_fn is not None and not x.detach().requires_grad
    assert "shape=(3, 8)" in repr(x) and "dim 1, part 0 of 2 over tp" in repr(x) and "8, 8" not in repr(x)
    assert x.tolist() == [[1.0] * 8] * 3 and dict(axis.gathers) == {"tolist": 1}
    assert x.new_zeros(3, 8).shape == (3, 8) and not isinstance(x.new_zeros(3, 8), ShardedTensor)
    assert x.stride() == (8, 1) and x.t().stride(-1) == 8
    assert x.contiguous() is x and x.float() is x
    doubled = x.map_local(lambda t: t * 2)
    assert isinstance(doubled, ShardedTensor) and doubled.shape == (3, 8) and doubled.local.sum() == 24
    twin = copy.deepcopy(x)
    assert twin.local is not local and torch.equal(twin.local, local) and twin.axis is axis
    y = x * 3
    y.retain_grad()
    seen = []
    y.register_hook(lambda grad: seen.append(grad.shape))
    y.sum().backward()
    assert seen == [(3, 8)] and y.grad.shape == (3, 8) and x.grad.shape == (3, 8) and x.data.shape == (3, 8)


def test_saving_is_refused() -> None:
    x = ShardedTensor(torch.ones(2), 0, (4,), LocalAxis("tp", 2, 0))
    with pytest.raises(ModelError, match=r"cannot be saved: save x\.full_tensor"):
        pickle.dumps(x)
    with pytest.raises(ModelError, match="data_ptr needs the memory of a sharded tensor"):
        x.data_ptr()


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * 2


class Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad.expand(4)


def test_custom_functions_never_lose_a_gradient() -> None:
    x = ShardedTensor(torch.ones(2, requires_grad=True), 0, (4,), LocalAxis("tp", 2, 0))
    with pytest.raises(ModelError, match="Double was applied to a sharded tensor"):
        Double.apply(x) + 1
    with pytest.raises(ModelError, match="autograd function was applied to a sharded tensor"):
        Total.apply(x).backward()
    filled = torch.zeros_like(x)
    filled += x
    with pytest.raises(ModelError, match="Double was applied to a sharded tensor"):
        Double.apply(filled) + 1
    with torch.no_grad():
        assert (x + 1).local.sum() == 4


def test_views_of_a_cut_dim() -> None:
    assert view_cut((2, 3, 24), 2, (8, 8, 8), (2, 3, 3, 4, 2), 2) == (3, (4,))
    assert view_cut((2, 3, 3, 4, 2), 3, (4,), (2, 3, 24), 2) == (2, (8, 8, 8))
    assert view_cut((2, 3, 24), 2, (8, 8, 8), (6, 24), 2) == (1, (8, 8, 8))
    assert view_cut((1, 4, 6), 1, (4,), (4, 1, 6), 2) == (0, (4,))
    assert view_cut((2, 4, 3), 1, (4,), (8, 3), 2) == (0, (4, 4))
    assert view_cut((8, 3), 0, (4, 4), (2, 4, 3), 2) == (1, (4,))
    with pytest.raises(NoRule):  # every rank holds a part of each row
        view_cut((2, 24), 1, (24,), (2, 3, 8), 2)
    assert resolve_shape((2, -1, 4), 24) == (2, 3, 4)
    assert take_segments((8, 4, 4), 8, 16) == slice(1, 3)
    with pytest.raises(NoRule):
        take_segments((8, 4, 4), 4, 12)
