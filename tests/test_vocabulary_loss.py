"""Cross entropy on logits that are cut along the vocabulary equals torch's on whole logits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightning_par.runtime.axis import LocalAxis
from lightning_par.tensor import ShardedTensor, vocabulary_parallel_cross_entropy
from tests.axes import tp_axis
from tests.ranks import run_ranks

N, V = 7, 24
SHAPES = [((N, V), 1), ((V,), 0), ((2, V, 5), 1), ((2, V, 3, 2), 1)]


def options() -> list[dict[str, Any]]:
    weight = torch.linspace(0.1, 2.0, V)
    return [
        {"reduction": reduction, "label_smoothing": smoothing, "weight": class_weight, "ignore_index": ignored}
        for reduction, smoothing, class_weight, ignored in itertools.product(
            ("mean", "sum", "none"), (0.0, 0.1), (None, weight), (-100, 3)
        )
    ]


def check(shape: tuple[int, ...], dim: int, option: dict[str, Any], axis: Any, scale: float = 3.0) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator) * scale).requires_grad_()
    target = torch.randint(V, shape[:dim] + shape[dim + 1 :], generator=generator)
    if target.dim():
        target.view(-1)[1] = option["ignore_index"]
    expected = F.cross_entropy(logits, target, **option)
    coefficient = torch.linspace(-1, 1, expected.numel()).view(expected.shape) + 0.3
    (expected * coefficient).sum().backward()
    local = logits.detach().chunk(axis.size, dim)[axis.coordinate].clone().requires_grad_()
    result = F.cross_entropy(ShardedTensor(local, dim, (V,), axis), target, **option)
    (result * coefficient).sum().backward()
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(local.grad, logits.grad.chunk(axis.size, dim)[axis.coordinate], rtol=1e-5, atol=1e-6)


def run_losses(rank: int, size: int) -> dict[str, Any]:
    axis = tp_axis()
    for (shape, dim), option in itertools.product(SHAPES, options()):
        check(shape, dim, option, axis)
    check((N, V), 1, options()[0], axis, scale=1e4)  # exp would overflow without the maximum
    assert not axis.gathers and not axis.calls["all_gather"]

    axis.calls.clear()
    local = torch.randn(N, V // size, requires_grad=True)
    loss = vocabulary_parallel_cross_entropy(local, torch.arange(N), axis)
    forward = axis.calls["all_reduce"]
    loss.backward()
    ignored = vocabulary_parallel_cross_entropy(local, torch.full((N,), -100), axis)
    assert ignored.isnan()
    half = vocabulary_parallel_cross_entropy(local.bfloat16(), torch.arange(N), axis)
    with torch.autocast("cpu", torch.bfloat16):
        automatic = vocabulary_parallel_cross_entropy(local.bfloat16(), torch.arange(N), axis)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        vocabulary_parallel_cross_entropy(local, torch.full((N,), V), axis)

    torch.manual_seed(0)
    whole = torch.randn(N, V)
    sharded = ShardedTensor(whole.chunk(size, 1)[rank].clone(), 1, (V,), axis)
    probabilities = torch.rand(N, V).softmax(-1)
    assert torch.allclose(F.cross_entropy(sharded, probabilities), F.cross_entropy(whole, probabilities))
    return {
        "forward": forward,
        "half": half.dtype,
        "automatic": automatic.dtype,
        "gathers": dict(axis.gathers),
        "all": axis.calls["all_reduce"],
    }


@pytest.mark.parametrize("size", [2, 3])
def test_equals_torch(size: int) -> None:
    for result in run_ranks(run_losses, size):
        assert result["forward"] == 2  # the maximum, and one stack of sums; nothing in the backward
        assert (result["half"], result["automatic"]) == (torch.bfloat16, torch.float32)
        assert result["gathers"] == {"cross_entropy": 1}  # probabilities as targets


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="maximum is not a valid value for reduction"):
        vocabulary_parallel_cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]), LocalAxis("tp", 2, 0), reduction="maximum")
