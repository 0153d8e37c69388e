"""Sums, norm and clipping against arithmetic: the gradient of a model of N ones has the norm sqrt(N)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_par.gradients import clip_by_norm, clip_by_value, global_norm, sum_shared_gradients
from lightning_par.layout import Layout
from lightning_par.runtime.axis import LocalAxis
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.parameter import ParameterSpec, Split, set_spec
from lightning_par.zero import bucket
from lightning_par.zero.replicated import ReplicatedStates
from tests.ranks import COLLECTIVE_TIMEOUT, run_ranks


def parameters_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def average_over_dp(rank: int, world_size: int) -> None:
    """Odd shapes, three dtypes, buckets of 40 bytes; one gradient missing on rank 1, one on both."""
    bucket.BUCKET_BYTES = 40
    mesh = Mesh(Layout(dp=world_size), COLLECTIVE_TIMEOUT)
    module = nn.ParameterList(
        parameters_of((3, 5), (7,), (), (2, 3))
        + parameters_of((5,), dtype=torch.bfloat16)
        + parameters_of((3,), dtype=torch.float64)
        + parameters_of((4,))
    )
    for i, parameter in enumerate(module):
        if i != 3 and not (i == 1 and rank == 1):
            parameter.grad = torch.full_like(parameter, (rank + 1) * 2.0**i)
    states = ReplicatedStates(module, [torch.optim.SGD(module[:6]), torch.optim.SGD(module[6:])], mesh.dp)
    states.reduce(states.optimizers[0])
    means = [1.5, 1.0, 6.0, None, 24.0, 48.0, (rank + 1) * 64.0]  # rank 0 alone has the second; the last is another optimizer's
    for parameter, mean in zip(module, means, strict=True):
        if mean is None:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, torch.full_like(parameter, mean))
    assert all(fragment.is_counted == (rank == 0) for fragment in states.gradients())


def test_gradients_are_averaged_in_buckets() -> None:
    run_ranks(average_over_dp, 2)


def test_half_precision_gradients_are_summed_in_float32() -> None:
    class ThousandRanks(LocalAxis):
        def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
            assert torch.equal(tensor[:2], torch.full((2,), 1 / 1000, dtype=torch.float32))
            tensor.mul_(1000)

    (parameter,) = parameters_of((2,), dtype=torch.bfloat16)
    parameter.grad = torch.full_like(parameter, 1.0)
    bucket.sum_gradients([parameter], [(2,)], ThousandRanks("dp", 1000, 0), scale=1 / 1000)
    assert torch.equal(parameter.grad, torch.ones_like(parameter))


def shared_gradients(rank: int, world_size: int) -> None:
    """A tied weight missing on the last stage, a partial one missing on tp 1, both with emptied data as ZeRO-3 leaves them."""
    mesh = Mesh(Layout(tp=2, pp=2, dp=1), COLLECTIVE_TIMEOUT)
    mesh.tied((0, 1))
    tied, partial, plain, nowhere = parameters_of((4, 3), (3,), (2,), (3, 2))
    set_spec(tied, ParameterSpec("tied", (8, 3), Split(0, (8,)), stages=(0, 1)))
    set_spec(partial, ParameterSpec("partial", (3,), stages=(mesh.coordinate.pp,), partial=True))
    set_spec(plain, ParameterSpec("plain", (2,), stages=(mesh.coordinate.pp,)))
    set_spec(nowhere, ParameterSpec("nowhere", (3, 2), stages=(0, 1)))
    if mesh.is_first_stage:
        tied.grad = torch.full((4, 3), 1.0 + mesh.coordinate.tp)
    if mesh.coordinate.tp == 0:
        partial.grad = torch.full((3,), 5.0)
    plain.grad = torch.full((2,), 7.0)
    for parameter in (tied, partial, nowhere):
        parameter.data = torch.empty(0)
    sum_shared_gradients([partial, nowhere, plain, tied], mesh)
    assert torch.equal(tied.grad, torch.full((4, 3), 1.0 + mesh.coordinate.tp))
    assert torch.equal(partial.grad, torch.full((3,), 5.0))
    assert torch.equal(plain.grad, torch.full((2,), 7.0))
    assert nowhere.grad is None
    assert tied.data.numel() == 0


def test_tied_and_partial_gradients_are_summed() -> None:
    run_ranks(shared_gradients, 4)


def norm_of_ones(rank: int, world_size: int, layout: Layout, broken: float | None) -> float:
    """Split, replicated and tied parameters of ones, one per stage and one shared; ``broken`` is put on the last rank."""
    mesh = Mesh(layout, COLLECTIVE_TIMEOUT)
    stage, stages = (mesh.coordinate.pp,), tuple(range(layout.pp))
    split, replicated, tied, split_tied = parameters_of((6 // layout.tp, 5), (7,), (3,), (2, 4 // layout.tp))
    set_spec(split, ParameterSpec("split", (6, 5), Split(0, (6,)), stage))
    set_spec(replicated, ParameterSpec("replicated", (7,), None, stage))
    set_spec(tied, ParameterSpec("tied", (3,), None, stages))
    set_spec(split_tied, ParameterSpec("split_tied", (2, 4), Split(1, (4,)), stages))
    module = nn.ParameterList([split, replicated, tied, split_tied])
    for parameter in module:
        parameter.grad = torch.ones_like(parameter)
    if broken is not None and rank == world_size - 1:
        split.grad[0, 0] = broken
    norm = global_norm(ReplicatedStates(module, [torch.optim.SGD(module)], mesh.dp), mesh)
    assert norm.dtype == torch.float32
    return norm.item()


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2, dp=1), Layout(tp=2, pp=1, dp=2), Layout(tp=1, pp=2, dp=2)], ids=str)
def test_the_norm_counts_every_element_once(layout: Layout) -> None:
    num_elements = layout.pp * (30 + 7) + 3 + 8
    assert run_ranks(norm_of_ones, 4, layout, None) == [pytest.approx(math.sqrt(num_elements), rel=1e-6)] * 4


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_stays_so_on_every_rank(broken: float) -> None:
    norms = run_ranks(norm_of_ones, 2, Layout(tp=2, pp=1, dp=1), broken)
    assert [repr(norm) for norm in norms] == [repr(broken)] * 2


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_by_norm_is_torchs(max_norm: float) -> None:
    torch.manual_seed(0)
    module, other = (nn.ParameterList(parameters_of((3, 5), (7,))) for _ in range(2))
    for parameter, twin in zip(module, other, strict=True):
        parameter.grad = torch.randn_like(parameter)
        twin.grad = parameter.grad.clone()
    norm = nn.utils.clip_grad_norm_(other, max_norm)
    clip_by_norm(ReplicatedStates(module, [torch.optim.SGD(module)], LocalAxis("dp", 1, 0)), max_norm, norm)
    for parameter, twin in zip(module, other, strict=True):
        assert torch.equal(parameter.grad, twin.grad)


def test_clipping_by_value_takes_one_optimizer_where_asked() -> None:
    module = nn.ParameterList(parameters_of((3,), (3,)))
    for parameter in module:
        parameter.grad = torch.tensor([-2.0, 0.25, 2.0])
    states = ReplicatedStates(module, [torch.optim.SGD(module[:1]), torch.optim.SGD(module[1:])], LocalAxis("dp", 1, 0))
    clip_by_value(states, 0.5, states.optimizers[1])
    assert module[0].grad.tolist() == [-2.0, 0.25, 2.0]
    assert module[1].grad.tolist() == [-0.5, 0.25, 0.5]
