"""Parts that several ranks hold: the split, the collectives and the rules give what plain torch gives on the whole tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_par.gradients import global_norm, sum_shared_gradients
from lightning_par.layout import Layout
from lightning_par.runtime.axis import CopiedAxis, LocalAxis
from lightning_par.runtime.collective import copy_to, gather_from, reduce_from, scatter_to
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.parameter import ParameterSpec, Split, set_spec
from lightning_par.tensor import ShardedTensor
from lightning_par.tensor.copies import axis_with
from lightning_par.zero.replicated import ReplicatedStates
from lightning_par.zero.states import Fragment
from tests.axes import tp_axis
from tests.ranks import COLLECTIVE_TIMEOUT, run_ranks

RANKS = 4
B, T, D, Q = 2, 3, 6, 4  # query heads; key heads are 1 or 2

# ---------------------------------------------------------------------- the split


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_a_split_puts_copies_together(copies: int) -> None:
    whole, split = torch.randn(3, 8), Split(1, (8,), (copies,))
    shards = [split.shard(whole, RANKS, rank) for rank in range(RANKS)]
    assert all(torch.equal(shards[rank], shards[rank - rank % copies]) for rank in range(RANKS))
    assert [tuple(shard.shape) for shard in shards] == [split.local_shape((3, 8), RANKS)] * RANKS
    assert torch.equal(split.unshard(shards), whole)
    addends = [split.shard(whole, RANKS, rank, is_total=True) for rank in range(RANKS)]
    assert torch.equal(split.unshard(addends, is_total=False), whole)


def test_segments_have_copies_of_their_own() -> None:
    whole, split = torch.arange(16.0), Split(0, (8, 4, 4), (1, 2, 4))
    assert split.local_segments(RANKS) == (2, 2, 4)
    assert split.shard(whole, RANKS, 2).tolist() == [4, 5, 10, 11, 12, 13, 14, 15]
    assert torch.equal(split.unshard([split.shard(whole, RANKS, rank) for rank in range(RANKS)]), whole)


def test_copies_count_parts() -> None:
    axes = [CopiedAxis(LocalAxis("tp", RANKS, rank), 2) for rank in range(RANKS)]
    assert [(axis.size, axis.coordinate) for axis in axes] == [(2, 0), (2, 0), (2, 1), (2, 1)]


# ---------------------------------------------------------------------- functions of whole tensors, on parts

KEYS = {1: ((B, 1, T, D), Split(1, (1,), (4,))), 2: ((B, 2, T, D), Split(1, (2,), (2,)))}
QUERIES = ((B, Q, T, D), Split(1, (Q,)))
FUSED = {kv: ((B, T, (Q + 2 * kv) * D), Split(2, (Q * D, kv * D, kv * D), (1, 4 // kv, 4 // kv))) for kv in (1, 2)}


def repeat_kv(k: torch.Tensor) -> torch.Tensor:
    b, kv, t, d = k.shape
    return k[:, :, None].expand(b, kv, Q // kv, t, d).reshape(b, Q, t, d)


def halves(k: torch.Tensor) -> torch.Tensor:
    """Rotary positions."""
    a, b = k.chunk(2, -1)
    return k * torch.linspace(0, 1, T)[:, None] + torch.cat([-b, a], -1)


def normed(k: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(k, (D,), weight) * weight


def multi_query(k: torch.Tensor) -> torch.Tensor:
    return k.expand(-1, Q, -1, -1) + k.squeeze(1)[:, None]


def in_groups(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    q = q.unflatten(1, (k.shape[1], -1)).transpose(1, 3)
    return (q.transpose(1, 3) * k[:, :, None] + torch.ones(k.shape[1], 1, 1, 1)).flatten(1, 2)


def masked_groups(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    q = q.view(B, k.shape[1], -1, T, D)
    scores = (q @ k[:, :, None].mT).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ k[:, :, None]).reshape(B, Q, T, D)


def fused(y: torch.Tensor) -> torch.Tensor:
    kv = (y.shape[-1] // D - Q) // 2
    q, k, v = y.float().double().view(B, T, -1, D).transpose(1, 2).split([Q, kv, kv], 1)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def pieces(y: torch.Tensor) -> list[torch.Tensor]:
    return [y[..., : Q * D], y.narrow(-1, Q * D, y.shape[-1] - Q * D), y[..., Q * D :].chunk(2, -1)[1]]


def assigned(k: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """In place, with another operand that fewer ranks hold copies of."""
    return (repeat_kv(k) * 1).mul_(q)


# function, inputs with their splits, and the functions that may gather
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[str, ...]]] = {}
for _kv, _key in KEYS.items():
    CASES |= {
        f"{name}, {_kv} key heads": case
        for name, case in {
            "repeated keys and queries": (lambda q, k: q @ repeat_kv(k).mT, (QUERIES, _key), ()),
            "keys repeated in place": (lambda q, k: k.repeat_interleave(Q // k.shape[1], 1) * q, (QUERIES, _key), ()),
            "einsum": (lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, repeat_kv(k)), (QUERIES, _key), ()),
            "attention": (lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), (QUERIES, _key), ()),
            "broadcast groups": (in_groups, (QUERIES, _key), ()),
            "masked groups": (masked_groups, (QUERIES, _key), ()),
            "rotary": (halves, (_key,), ()),
            "norm of heads": (normed, (_key, ((D,), None)), ()),
            "sum over heads": (lambda k: k.sum(1) + (k > 0).sum(1), (_key,), ()),
            "mean of all": (lambda k: k.mean(), (_key,), ()),
            "contraction": (lambda k: k.flatten(1) @ torch.ones(k[0].numel(), 2), (_key,), ()),
            "flattened and back": (lambda k: k.transpose(1, 2).flatten(2).view(B, T, -1, D), (_key,), ()),
            "softmax over heads": (lambda k: k.softmax(1), (_key,), ("softmax",)),
            "in place": (assigned, (_key, QUERIES), ("mul_", "mul_")),
            "repeated twice": (lambda k: k.repeat(1, 2, 1, 1), (_key,), ()),
            "joined with queries": (lambda q, k: torch.cat([q, k], 1) * 2, (QUERIES, _key), ()),
            "fused": (fused, (FUSED[_kv],), ()),
            "pieces of fused": (pieces, (FUSED[_kv],), ()),
            "a bias on fused": (lambda y, b, s: (y + b) * s, (FUSED[_kv], ((FUSED[_kv][0][2],), None), ((T, 1), None)), ()),
            "fused, summed": (lambda y: y.sum(-1), (FUSED[_kv],), ("sum",)),
            "fused, as something else": (lambda y: y.view(B, T, -1, Q, D // 2), (FUSED[_kv],), ("view",)),
        }.items()
    }
CASES |= {
    "one key head": (multi_query, (KEYS[1],), ()),
    "groups, summed": (lambda q: q.view(B, 2, 2, T, D).sum(2), (QUERIES,), ("sum",)),
    "groups, contracted with heads": (lambda q: torch.einsum("bhgtd->btd", q.view(B, 2, 2, T, D)), (QUERIES,), ("einsum",)),
    "groups, gathered": (lambda q: q.view(B, 2, 2, T, D).permute(0, 2, 1, 3, 4).reshape(-1), (QUERIES,), ("reshape",)),
    "groups, in place": (
        lambda q: (q * 1).view(B, 2, 2, T, D).index_fill_(3, torch.tensor([0]), 2.0),
        (QUERIES,),
        ("index_fill_",),
    ),
}


def outputs(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def loss_of(results: list[torch.Tensor]) -> torch.Tensor:
    return sum((r * torch.linspace(-1, 1, r.numel()).view(r.shape)).sum() for r in results)  # type: ignore[return-value]


def check_case(function: Callable[..., Any], inputs: tuple[Any, ...], gathers: tuple[str, ...]) -> None:
    axis, generator = tp_axis(), torch.Generator().manual_seed(1)
    wholes = [torch.randn(shape, generator=generator).requires_grad_() for shape, _ in inputs]
    expected = outputs(function(*wholes))
    gradients = torch.autograd.grad(loss_of(expected), wholes)
    leaves, given = [], []
    for whole, (_, split) in zip(wholes, inputs, strict=True):
        data = whole.detach()
        leaf = (data.clone() if split is None else split.shard(data, axis.size, axis.coordinate)).requires_grad_()
        leaves.append(leaf)
        given.append(leaf if split is None else ShardedTensor(leaf, split.dim, split.segments, axis_with(axis, split.copies)))
    results = outputs(function(*given))
    assert sorted(axis.gathers.elements()) == sorted(gathers)
    results = [result.full_tensor() if isinstance(result, ShardedTensor) else result for result in results]
    torch.testing.assert_close(results, expected)
    loss_of(results).backward()
    for leaf, (_, split), want in zip(leaves, inputs, gradients, strict=True):
        assert leaf.grad is not None
        total = leaf.grad if split is None else split.unshard(axis.all_gather(leaf.grad), is_total=False)
        torch.testing.assert_close(total, want)


def run_cases(rank: int, size: int) -> dict[str, str]:
    torch.set_default_dtype(torch.float64)
    failures = {}
    for name, case in CASES.items():
        try:
            check_case(*case)
        except Exception as error:  # collected, so that one start shows all
            failures[name] = f"{type(error).__name__}: {error}"
    return failures


def test_every_function_equals_plain_torch() -> None:
    assert run_ranks(run_cases, RANKS) == [{}] * RANKS


# ---------------------------------------------------------------------- collectives and their conjugates


def conjugates(rank: int, size: int) -> None:
    """With 2 copies of 2 parts: a gradient that all know whole comes back whole, one of copies comes back as addends."""
    finest, split = tp_axis(), Split(0, (4,), (2,))
    axis = CopiedAxis(finest, 2)
    whole = torch.arange(4.0)
    part = split.shard(whole, size, rank).requires_grad_()
    part.grad = None
    (gather_from(part, axis, split) * whole).sum().backward()
    assert part.grad is not None and torch.equal(part.grad, split.shard(whole, size, rank) / 2)
    part.grad = None
    total = reduce_from(part.square(), axis)
    assert torch.equal(total, (whole[:2] ** 2 + whole[2:] ** 2).detach())
    total.sum().backward()
    assert part.grad is not None and torch.equal(part.grad, part.detach())  # half of 2 x
    for given in (copy_to, lambda x, axis: scatter_to(x, axis, split)):
        replicated = whole.clone().requires_grad_()
        local = given(replicated, axis)
        (local * (rank + 1)).sum().backward()
        addends = [rank + 1 for rank in range(size)]
        expected = [sum(addends)] * 4 if given is copy_to else [3, 3, 7, 7]
        assert replicated.grad is not None and replicated.grad.tolist() == expected


def test_the_collectives_of_copies_are_conjugate() -> None:
    run_ranks(conjugates, RANKS)


# ---------------------------------------------------------------------- gradients of weights


class InPieces(ReplicatedStates):
    """Gives gradients in flat pieces that begin anywhere, the last one padded, as partitioned states do."""

    def gradients(self, optimizer: torch.optim.Optimizer | None = None) -> Any:
        for gradient, parameter, _, is_counted in super().gradients(optimizer):
            flat = torch.cat([gradient.flatten(), torch.zeros(3)])
            for start in range(0, flat.numel(), 7):
                yield Fragment(flat[start : start + 7], parameter, start, is_counted)


def sum_and_count(rank: int, size: int) -> list[float]:
    """Gradients of copies are summed over the ranks that hold them, and the norm counts every element once."""
    mesh = Mesh(Layout(tp=4, pp=1, dp=1), COLLECTIVE_TIMEOUT)
    mesh.copies(2)
    mesh.copies(4)
    splits = {
        "k": ((6, 5), Split(0, (6,), (2,))),
        "qkv": ((16, 5), Split(0, (8, 4, 4), (1, 2, 2))),
        "transposed": ((5, 16), Split(1, (8, 4, 4), (1, 4, 4))),
        "bias": ((12,), Split(0, (8, 4), (1, 4))),
        "frozen": ((12,), Split(0, (8, 4), (1, 4))),
    }
    module = nn.ParameterList()
    for name, (shape, split) in splits.items():
        parameter = nn.Parameter(torch.zeros(split.local_shape(shape, size)))
        set_spec(parameter, ParameterSpec(name, shape, split))
        parameter.grad = split.shard(torch.ones(shape), size, rank, is_total=True) if name != "frozen" else None
        module.append(parameter)
    sum_shared_gradients(module, mesh)
    assert all(parameter.grad is None or torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in module)
    optimizers = [torch.optim.SGD(module)]
    return [global_norm(states(module, optimizers, mesh.dp), mesh).item() ** 2 for states in (ReplicatedStates, InPieces)]


def test_gradients_of_copies_are_summed_and_counted_once() -> None:
    num_elements = 6 * 5 + 16 * 5 + 5 * 16 + 12
    assert run_ranks(sum_and_count, RANKS) == [[pytest.approx(num_elements, rel=1e-6)] * 2] * RANKS
