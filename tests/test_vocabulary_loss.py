"""Losses on logits that are cut along the vocabulary equal torch's on whole logits, whether or not the ranks divide it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightning_par.runtime.axis import Axis, LocalAxis
from lightning_par.runtime.parameter import Split
from lightning_par.tensor import ShardedTensor, vocabulary_parallel_cross_entropy
from tests.axes import tp_axis
from tests.ranks import run_ranks

N = 7
Check = tuple[Callable[..., torch.Tensor], torch.Tensor, dict[str, Any]]  # a loss, its target, its options


def product(**values: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Every combination of options."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def checks(V: int, shape: tuple[int, ...], dim: int) -> Iterator[Check]:
    """Every loss with every option, on logits of ``shape`` with V classes in ``dim``."""
    generator = torch.Generator().manual_seed(0)
    weight, reductions = torch.linspace(0.1, 2.0, V), ("mean", "sum", "none")
    labels = torch.randint(V, shape[:dim] + shape[dim + 1 :], generator=generator)
    for options in product(reduction=reductions, label_smoothing=(0.0, 0.1), weight=(None, weight), ignore_index=(-100, 3)):
        yield F.cross_entropy, _with_ignored(labels, options["ignore_index"]), options
    for options in product(reduction=reductions, weight=(None, weight), ignore_index=(-100, 3)):
        target = _with_ignored(labels, options["ignore_index"])
        yield lambda x, y, **rest: F.nll_loss(F.log_softmax(x, dim), y, **rest), target, options
    probabilities = torch.rand(shape, generator=generator).softmax(dim)
    for options in product(reduction=reductions, label_smoothing=(0.0, 0.1), weight=(None, weight)):
        yield F.cross_entropy, probabilities, options
    for options in product(reduction=(*reductions, "batchmean")):
        yield lambda x, y, **rest: F.kl_div(F.log_softmax(x, dim), y, **rest), probabilities, options


def _with_ignored(labels: torch.Tensor, ignored: int) -> torch.Tensor:
    labels = labels.clone()
    if labels.dim():
        labels.view(-1)[1] = ignored
    return labels


def check(case: Check, shape: tuple[int, ...], dim: int, axis: Axis, scale: float = 3.0) -> None:
    """Values and gradients. What is beyond the whole logits is undefined, and must get a gradient of exactly 0."""
    loss, target, options = case
    logits = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale).requires_grad_()
    cut = Split(dim, (shape[dim],))
    expected = loss(logits, target, **options)
    coefficient = torch.linspace(-1, 1, expected.numel()).view(expected.shape) + 0.3
    (expected * coefficient).sum().backward()
    is_real = cut.shard(torch.ones(shape), axis.size, axis.coordinate).bool()
    local = cut.shard(logits.detach(), axis.size, axis.coordinate).masked_fill(~is_real, torch.nan).requires_grad_()
    result = loss(ShardedTensor(local, dim, (shape[dim],), axis), target, **options)
    result = result.full_tensor() if isinstance(result, ShardedTensor) else result
    (result * coefficient).sum().backward()
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert local.grad is not None and logits.grad is not None
    torch.testing.assert_close(local.grad, cut.shard(logits.grad, axis.size, axis.coordinate), rtol=1e-5, atol=1e-6)
    assert (local.grad[~is_real] == 0).all()


def run_losses(rank: int, size: int, V: int) -> dict[str, Any]:
    axis = tp_axis()
    for shape, dim in [((N, V), 1), ((V,), 0), ((2, V, 5), 1), ((2, V, 3, 2), 1)]:
        for case in checks(V, shape, dim):
            check(case, shape, dim, axis)
    check(next(checks(V, (N, V), 1)), (N, V), 1, axis, scale=1e4)  # exp would overflow without the maximum
    assert not axis.gathers

    counts = {}
    local = Split(1, (V,)).shard(torch.randn(N, V, generator=torch.Generator().manual_seed(2)), size, rank).requires_grad_()
    logits, labels = ShardedTensor(local, 1, (V,), axis), torch.arange(N) % V
    for name, loss in {
        "cross entropy": F.cross_entropy(logits, labels),
        "negative log likelihood": F.nll_loss(logits.log_softmax(-1), labels),
        "z loss": logits.logsumexp(-1).square().mean(),
    }.items():
        axis.calls.clear()
        loss.backward()
        counts[name] = axis.calls["all_reduce"]
    axis.calls.clear()
    F.cross_entropy(logits, labels)
    counts["forward"] = axis.calls["all_reduce"]
    assert F.cross_entropy(logits, torch.full((N,), -100)).isnan()
    for wrong in (V, -1):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            F.cross_entropy(logits, torch.full((N,), wrong))
    dtypes = [F.cross_entropy(logits.bfloat16(), labels).dtype, F.log_softmax(logits.bfloat16(), -1).dtype]
    with torch.autocast("cpu", torch.bfloat16):
        dtypes += [F.cross_entropy(logits.bfloat16(), labels).dtype, F.nll_loss(logits.bfloat16(), labels).dtype]
    return {"counts": counts, "dtypes": dtypes, "gathers": dict(axis.gathers)}


@pytest.mark.parametrize(("size", "classes"), [(2, 24), (2, 25), (3, 25), (4, 9)])
def test_equals_torch(size: int, classes: int) -> None:
    for result in run_ranks(run_losses, size, classes):
        # forward the maximum, and one stack of sums; the gradient of a logarithm of all probabilities is a sum over them
        assert result["counts"] == {"cross entropy": 0, "negative log likelihood": 1, "z loss": 0, "forward": 2}
        assert result["dtypes"] == [torch.bfloat16] * 2 + [torch.float32] * 2
        assert result["gathers"] == {}


def test_what_gathers() -> None:
    """Class indices as floats, sums in the old style: torch's own messages and results, on whole logits."""
    axis = LocalAxis("tp", 2, 0)
    logits = ShardedTensor(torch.zeros(N, 4), 1, (7,), axis)
    with pytest.raises(RuntimeError):
        F.cross_entropy(logits, torch.zeros(N))
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        assert F.cross_entropy(logits, torch.zeros(N, dtype=torch.long), size_average=False) > 0
    assert axis.gathers == {"cross_entropy": 2}


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="maximum is not a valid value for reduction"):
        vocabulary_parallel_cross_entropy(
            torch.ones(2, 3), torch.tensor([0, 1]), LocalAxis("tp", 2, 0), vocabulary=6, reduction="maximum"
        )
