"""What ranks must hold alike is compared bit for bit: one flipped bit is named, and no run without one is stopped."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.precision import MixedPrecision

from lightning_par import ConfigurationError, HybridParallelStrategy
from lightning_par.errors import ReplicaError
from lightning_par.guard.drift import _checksum
from lightning_par.runtime.parameter import get_spec
from tests.guarded import ROWS, STEPS, Guarded, batches, fit
from tests.models import TransformersModel, make_batch
from tests.ranks import run_ranks

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
UP, NORM, TIED = "network.blocks.1.up.weight", "network.blocks.1.norm.weight", "network.enter.weight"


def one_key_head() -> pl.LightningModule:
    """Attention of which two tp ranks hold copies of the only key head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return TransformersModel(LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=2, **sizes)))


class Flip(pl.Callback):
    """Flips a bit of one tensor on one rank after the second step.

    Args:
        name: of the parameter.
        rank: where.
        key: which state of the optimizer; None for the parameter itself.
        bit: of the first element.
    """

    def __init__(self, name: str, rank: int, key: str | None = None, bit: int = 20) -> None:
        self.name, self.rank, self.key, self.bit = name, rank, key, bit

    def on_train_batch_end(self, trainer: Any, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and trainer.global_rank == self.rank:
            held = trainer.strategy.states.weights() if self.key is None else trainer.strategy.states.held()
            values = next(
                each.values for each in held if get_spec(each.parameter).name == self.name and self.key in (None, each.key)
            )
            values[:1].view(INTEGERS[values.dtype.itemsize]).bitwise_xor_(1 << self.bit)


def message(module: pl.LightningModule, layout: str, world_size: int, flip: Flip | None = None, **options: Any) -> str:
    data = batches(ROWS) if isinstance(module, Guarded) else [make_batch(step, ROWS) for step in range(STEPS)]
    callbacks = [] if flip is None else [flip]
    try:
        fit(module, data, layout, world_size, {"drift_guard": 1, **options.pop("strategy", {})}, callbacks=callbacks, **options)
    except ReplicaError as error:
        return str(error)
    return "trained"


# of two ranks: the layout, what is flipped on rank 1, over which axis
FLIPS = [
    ("dp2", UP, None, "dp", (0, 1, 0)),
    ("dp2", UP, "exp_avg_sq", "dp", (0, 1, 0)),
    ("dp2_zero1", UP, None, "dp", (0, 1, 0)),
    ("dp2_zero2", NORM, None, "dp", (0, 1, 0)),
    ("tp2", NORM, None, "tp", (0, 0, 1)),
    ("tp2", NORM, "exp_avg", "tp", (0, 0, 1)),
    ("tp2_sp", NORM, None, "tp", (0, 0, 1)),
    ("pp2_mb2", TIED, None, "its stages", (1, 0, 0)),
]


def _flips(rank: int, world_size: int) -> list[str]:
    found = [message(Guarded(is_tied=True), layout, world_size, Flip(name, rank=1, key=key)) for layout, name, key, _, _ in FLIPS]
    key_head = "model.model.layers.0.self_attn.k_proj.weight"
    return [*found, message(one_key_head(), "tp2", world_size, Flip(key_head, rank=1))]


def test_a_flipped_bit_is_named_on_all_ranks() -> None:
    first, second = run_ranks(_flips, 2, timeout=200)
    assert first == second
    for (layout, name, key, axis, (pp, dp, tp)), found in zip(FLIPS, first, strict=False):
        of = "" if key is None else f"{key} of "
        assert found.startswith(
            f"{of}{name} is no longer the same over {axis}, before step 3 of this run: so it is on rank 0 (pp 0, dp 0, tp 0), "
            f"unlike rank 1 (pp {pp}, dp {dp}, tp {tp}). Go on from a checkpoint from before"
        ), (layout, name, key)
    assert first[-1].startswith("model.model.layers.0.self_attn.k_proj.weight is no longer the same over the copies of tp, before")


QUIET = ["dp2", "tp2", "tp2_sp", "pp2_mb2", "pp2_vp2_mb2", "dp2_zero1", "dp2_zero2", "dp2_zero3"]


def _quiet(rank: int, world_size: int, layouts: list[str]) -> list[str]:
    options: list[dict[str, Any]] = [{}, {"precision": "bf16-true"}]
    options += [{"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}]
    return [
        message(Guarded(is_tied=True), layout, world_size, gradient_clip_val=1.0, **each) for layout in layouts for each in options
    ]


@pytest.mark.parametrize("layout", QUIET)
def test_no_run_without_a_difference_is_stopped(layout: str) -> None:
    assert run_ranks(_quiet, 2, [layout], timeout=200) == [["trained"] * 3] * 2


def test_no_run_of_several_axes_is_stopped() -> None:
    assert run_ranks(_quiet, 4, ["tp2_pp2_mb2", "tp2_dp2_zero3"], timeout=200) == [["trained"] * 6] * 4


def _minority(rank: int, world_size: int) -> str:
    return message(Guarded(), "dp4", world_size, Flip(UP, rank=2))


def test_ranks_that_agree_stand_together() -> None:
    for found in run_ranks(_minority, 4):
        assert (
            "so it is on rank 2 (pp 0, dp 2, tp 0), unlike rank 0 (pp 0, dp 0, tp 0) and rank 1 (pp 0, dp 1, tp 0) and rank 3"
            in found
        )


def _sent(rank: int, world_size: int, layout: str, every: int) -> list[int]:
    """Bytes of each all-reduce of the third step, apart from those without a guard, until its callbacks are called."""
    sent: list[int] = []
    sent_in_step: list[int] = []

    class Start(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: pl.LightningModule, optimizer: Any) -> None:
            sent.clear()

        def on_train_batch_end(self, *args: Any) -> None:
            sent_in_step[:] = sent

    original = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        fit(Guarded(is_tied=True), batches(ROWS), layout, world_size, {"drift_guard": every}, callbacks=[Start()])
    return sent_in_step


# per block 6 parameters, of which up.weight, up.bias and down.weight are cut over tp; 4 beside them: enter.weight, tied, norm
# (2), leave.bias. With two states each, three tensors a parameter where every replica has all
@pytest.mark.parametrize(
    ("layout", "compared"),
    [("dp2", [3 * 28]), ("dp2_zero1", [28]), ("dp2_zero3", []), ("tp2", [3 * (4 * 3 + 4)]), ("pp2_mb2", [3])],
)
def test_one_all_reduce_for_each_axis_of_16_bytes_a_tensor(layout: str, compared: list[int]) -> None:
    assert run_ranks(_sent, 2, layout, 1) == [[16 * count for count in compared] + [8]] * 2


def test_it_is_done_every_so_many_steps_alone() -> None:
    assert run_ranks(_sent, 2, "dp2", 2) == [[], []]
    assert run_ranks(_sent, 2, "dp2", 3) == [[16 * 3 * 28, 8]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_each_bit_counts(dtype: torch.dtype) -> None:
    values = torch.arange(23).to(dtype)
    before = _checksum(values, torch.device("cpu"))
    assert before.dtype is torch.int64
    integers = values.view(INTEGERS[dtype.itemsize])
    for place in (3, 22):
        for bit in range(8 * dtype.itemsize - 1):
            integers[place] ^= 1 << bit
            assert _checksum(values, torch.device("cpu")) != before, (place, bit)
            integers[place] ^= 1 << bit
    for other in (torch.cat([values[:1], values])[1:], values.view(23, 1).expand(23, 2)[:, 0]):
        assert _checksum(other, torch.device("cpu")) == before, "wherever it lies in memory"


@pytest.mark.parametrize("every", [-1, 2.5, True, "often"])
def test_what_is_no_number_of_steps_is_refused(every: Any) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"drift_guard={every}: ranks compare what they hold every so many")):
        HybridParallelStrategy("pp2", drift_guard=every)
