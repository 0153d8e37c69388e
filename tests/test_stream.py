"""Large weights alone, anywhere in what one process draws: bit for bit, without drawing what lies between."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import nn

from lightning_par.materialize import deferred_init, materialize_shard, whole_value
from lightning_par.materialize.piecewise import piecewise
from lightning_par.materialize.record import Place, record_of
from lightning_par.materialize.stream import CELL
from lightning_par.materialize.truncation import cuts_nothing, is_known
from lightning_par.runtime.parameter import Split

FAR = (1 << 23) + 1000  # more numbers than are passed over one by one


class Far(nn.Module):
    """Weights that are drawn, drawn again and drawn in passes, with small ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(FAR)), nn.Parameter(torch.empty(FAR).uniform_(-1, 2))
        self.small = nn.Parameter(torch.randn(3))  # has to be drawn to know how many numbers it takes
        self.uncut, self.cut = nn.Parameter(torch.empty(FAR)), nn.Parameter(torch.empty(1 << 20))
        nn.init.normal_(self.first, std=0.02)
        nn.init.trunc_normal_(self.uncut, std=0.02)
        nn.init.trunc_normal_(self.cut)
        nn.init.trunc_normal_(self.second, std=0.02)
        self.last = nn.Parameter(torch.randn(40))


def shard(tensor: torch.Tensor, coordinate: int) -> torch.Tensor:
    return materialize_shard(tensor, Split(0, (tensor.numel(),)), 4, coordinate)


def test_weights_far_from_each_other() -> None:
    torch.manual_seed(3)
    expected, after = Far(), torch.get_rng_state()
    torch.manual_seed(3)
    with deferred_init():
        module = Far()
    assert torch.equal(torch.get_rng_state(), after)
    for name in ("last", "cut", "first", "second", "uncut"):  # in no order: what is known of later draws helps none before
        tensor, whole = module.get_parameter(name), expected.get_parameter(name).detach()
        for coordinate in (3, 1):
            assert torch.equal(shard(tensor, coordinate), Split(0, (tensor.numel(),)).shard(whole, 4, coordinate)), name


def test_parts_that_share_a_group_of_numbers() -> None:
    """A rank that holds elements 0 to 4 and 10 to 36: both parts begin in the first group of 16."""
    torch.manual_seed(3)
    expected = [torch.randn(64), nn.init.trunc_normal_(torch.empty(64))]
    torch.manual_seed(3)
    with deferred_init():
        drawn = [torch.randn(64), nn.init.trunc_normal_(torch.empty(64))]
    split = Split(0, (10, 54))
    for tensor, whole in zip(drawn, expected, strict=True):
        assert torch.equal(materialize_shard(tensor, split, 2, 0), split.shard(whole, 2, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_bound_that_no_number_reaches_needs_no_passes(dtype: torch.dtype) -> None:
    with deferred_init():
        uncut = nn.init.trunc_normal_(torch.empty(40, 50, dtype=dtype), std=0.02)
        cut = nn.init.trunc_normal_(torch.empty(40, 50, dtype=dtype))
    torch.manual_seed(3)
    record = record_of(uncut)
    assert record is not None
    record.cache.clear()
    record.passes.clear()
    shard(uncut.view(-1), 1)
    assert not record.passes
    shard(cut.view(-1), 1)
    assert len(record.passes) == 1


def test_how_far_bounds_may_lie() -> None:
    assert cuts_nothing((0.0, 0.02, -2.0, 2.0)) and cuts_nothing((1.0, 0.02, -2.0, 2.0))
    assert not cuts_nothing((0.0, 0.5, -4.0, 9.0)) and not cuts_nothing((0.0, 0.5, -9.0, 4.0))
    assert not cuts_nothing((1e8, 1.0, 1e8 - 9, 1e8 + 9)), "single precision knows 1e8 to within 4"


@pytest.mark.parametrize(("dtype", "farthest"), [(torch.float32, 5.7681), (torch.float64, 8.5717), (torch.bfloat16, 5.7813)])
def test_the_farthest_normal_number(dtype: torch.dtype, farthest: float) -> None:
    """From a state in which the first numbers, which give the radius, are all ones, and those of the angle are zero."""
    generator = torch.Generator()
    state = generator.get_state()
    raw = state.numpy()
    words = raw[24 : 24 + 8 * 624].view(numpy.uint64)
    words[:] = 0
    words[: 16 if dtype == torch.float64 else 8] = 0x12DD9BB3  # the twister gives 2^32 - 1 for it
    raw[8:12].view(numpy.int32)[0], raw[16:24].view(numpy.uint64)[0] = 624, 0
    generator.set_state(state)
    assert torch.empty(16, dtype=torch.float64 if dtype == torch.float64 else torch.float32).uniform_(generator=generator)[0] < 1
    generator.set_state(state)
    drawn = torch.empty(16, dtype=dtype).normal_(generator=generator)
    assert abs(drawn.max().item() - farthest) < 1e-4
    low, high = -drawn.max().item(), drawn.max().item()
    assert is_known((0.0, 1.0, low, high), dtype) and not cuts_nothing((0.0, 1.0, low, high))


def small_draws() -> list[torch.Tensor]:
    return [torch.randn(3) for _ in range(1200)]


def test_many_draws_of_which_each_has_to_be_run() -> None:
    """More of them than Python calls functions within each other."""
    torch.manual_seed(3)
    expected = small_draws()
    torch.manual_seed(3)
    with deferred_init():
        drawn = small_draws()
    assert torch.equal(whole_value(drawn[-1]), expected[-1]) and torch.equal(whole_value(drawn[5]), expected[5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [48, 53, 2 * CELL + 21])
def test_every_precision_is_drawn_in_pieces(numel: int, dtype: torch.dtype) -> None:
    def draw() -> list[torch.Tensor]:
        normal, uniform = torch.empty(numel, dtype=dtype).normal_(1, 3), torch.empty(numel, dtype=dtype).uniform_(-1, 2)
        return [normal, uniform, nn.init.trunc_normal_(torch.empty(numel, dtype=dtype)), torch.randn(numel, dtype=dtype)]

    torch.manual_seed(3)
    expected, after = draw(), torch.get_rng_state()
    torch.manual_seed(3)
    with deferred_init():
        drawn = draw()
    assert torch.equal(torch.get_rng_state(), after)
    for tensor, whole in zip(drawn, expected, strict=True):
        record = record_of(tensor)
        assert record is not None and piecewise(record, Place.of(tensor)) is not None
        assert torch.equal(shard(tensor, 3), Split(0, (numel,)).shard(whole, 4, 3)) and torch.equal(whole_value(tensor), whole)
