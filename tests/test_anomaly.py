"""A loss or gradient that is not finite ends the run before the step, on all ranks, with the place where that began."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn

from lightning_par import ConfigurationError, HybridParallelStrategy
from lightning_par.errors import NumericsError
from lightning_par.guard.finding import Finding, describe_ranks, first_of
from lightning_par.guard.search import has_bad
from lightning_par.layout import parse_layout
from lightning_par.pipeline.action import Action, without_split
from tests.guarded import ROWS, STEPS, Guarded, batches, fit
from tests.models import MODELS, make_batch
from tests.ranks import run_ranks

CLIP: dict[str, Any] = {"gradient_clip_val": 1.0}
# word -> how many ranks there are; those of block 2, of the first block, of the loss
RANKS = {
    "single": (1, [0], [0], [0]),
    "tp2": (2, [0, 1], [0, 1], [0, 1]),
    "tp2_sp": (2, [0, 1], [0, 1], [0, 1]),
    "pp2_mb2": (2, [1], [0], [1]),
    "pp2_vp2_mb2": (2, [0], [0], [1]),
    "dp2_zero1": (2, [0, 1], [0, 1], [0, 1]),
    "dp2_zero3": (2, [0, 1], [0, 1], [0, 1]),
    "tp2_pp2_mb2": (4, [2, 3], [0, 1], [2, 3]),
}


class Kept(pl.Callback):
    """The weights before the bad step, and those that the error leaves."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.before, self.num_hooks = self._weights(trainer), num_hooks(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.after = self._weights(trainer)
        assert num_hooks(pl_module) == self.num_hooks, "those of the search are gone"

    def _weights(self, trainer: Any) -> list[torch.Tensor]:
        return [held.values.clone() for held in trainer.strategy.states.weights()]


def num_hooks(module: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


def message(module: pl.LightningModule, data: Any, layout: str, world_size: int, **options: Any) -> str:
    """What a run ends with; its weights are those before the bad step."""
    kept = Kept()
    try:
        fit(module, data, layout, world_size, callbacks=[kept], **options)
    except NumericsError as error:
        assert all(torch.equal(*pair) or pair[1].isnan().any() for pair in zip(kept.before, kept.after, strict=True))
        return str(error)
    return "trained"


def _cases(rank: int, world_size: int, layout: str) -> dict[str, str]:
    _, holders, _, _ = RANKS[layout]
    planted = {plant: Guarded(plant, only_rank=max(holders)) for plant in ("forward", "parameter")}
    planted.update({plant: Guarded(plant) for plant in ("backward", "loss", "between", "batch")})
    return {
        plant: message(module, batches(ROWS, 1 if plant == "batch" else None), layout, world_size, **CLIP)
        for plant, module in planted.items()
    }


def _expected(layout: str) -> dict[str, str]:
    world_size, holders, first, last = RANKS[layout]
    total = 2 if "mb2" in layout else 1
    block, step = "network.blocks.2", "step 1 (epoch 0, batch 1)"
    sized = parse_layout(layout).resolve(world_size)

    def on(ranks: list[int], microbatch: int = 0) -> str:
        return f"on {describe_ranks(ranks, sized)}, microbatch {microbatch} of {total}: "

    alone = [max(holders)]
    return {
        "forward": f"the loss of {step} is nan: it began in {block}.gate, in its output, while its input and all parameters were "
        f"finite, {on(alone)}look at the code of {block}.gate; detect_anomaly=null goes on regardless",
        "parameter": f"the loss of {step} is nan: it began in {block}.down, where the parameter {block}.down.bias was not finite "
        f"before the step, {on(alone)}go on from a checkpoint from before, with gradient_clip_val",
        "backward": f"the gradient norm of {step} is nan, and its loss is finite: it began in the backward of {block}, in "
        f"BadBackwardBackward, whose output gradient was finite, {on(holders)}look at the code of {block};",
        "loss": f"the loss of {step} is inf: it began in training_step, after all modules had given finite outputs, {on(last)}look "
        "at how the loss is computed;",
        "between": f"the loss of {step} is nan: it began in network.norm, whose input was not finite, while all modules before it "
        f"gave finite outputs, {on(last)}look at the code that calls network.norm;",
        "batch": f"the loss of {step} is nan: it began in network.enter, where x of the batch was not finite, "
        f"{on(first, total - 1)}mend the sample in the dataset;",
    }


@pytest.mark.parametrize("layout", RANKS)
def test_the_first_module_and_rank_are_named_on_all_ranks(layout: str) -> None:
    every = run_ranks(_cases, RANKS[layout][0], layout)
    expected = _expected(layout)
    if "sp" in layout:
        del expected["backward"]  # no custom function is seen on a tensor in parts
    for plant, words in expected.items():
        assert every[0][plant].startswith(words), plant
    assert all(each == every[0] for each in every)


def _float16() -> Any:
    """``precision=16-mixed``, for which Lightning takes bfloat16 on a CPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def _variants(rank: int, world_size: int) -> list[str]:
    data = batches(ROWS)
    return [
        message(Guarded("forward"), data, "pp2_mb2", world_size, strategy={"recompute": "full"}),
        message(Guarded("backward"), data, "pp2_mb2", world_size, strategy={"schedule": "zb-h1"}, **CLIP),
        message(Guarded("backward", (0, 0)), data, "dp2", world_size, accumulate_grad_batches=2, **CLIP),
        message(Guarded("forward"), data, "dp2_zero2", world_size, strategy={"zero": {"reduce": "microbatch"}}),
        message(Guarded("backward"), data, "dp2_zero2", world_size, strategy={"zero": {"reduce": "microbatch"}}, **CLIP),
        message(Guarded("backward"), data, "dp2", world_size, plugins=[_float16()], **CLIP),
        message(Guarded("backward"), data, "dp2", world_size),
        message(Guarded("forward"), data, "pp2", world_size, strategy={"compile": "eager"}),
        message(Guarded("random"), data, "pp2_mb2", world_size),
        message(Guarded("forward"), data, "pp2", world_size, strategy={"detect_anomaly": None}),
    ]


def test_with_recomputation_split_backwards_accumulation_and_early_reduction() -> None:
    every = run_ranks(_variants, 2)
    assert every[0] == every[1]
    recomputed, split, accumulated, early, early_backward, scaled, late, compiled, drawn, off = every[0]
    assert recomputed.startswith("the loss of step 1 (epoch 0, batch 1) is nan: it began in network.blocks.2.gate, in its output")
    assert "began in the backward of network.blocks.2, in BadBackwardBackward" in split and "on rank 1 (pp 1" in split
    assert accumulated.startswith("the gradient norm of step 0 (epoch 0, batch 1) is nan")
    assert "it began in the backward of network.blocks.0" in accumulated and "microbatch 0 of 1 of batch 0:" in accumulated
    assert "began in network.blocks.2.gate" in early
    assert "began in the backward of network.blocks.2" in early_backward
    assert scaled == "trained", "the loss scale takes it for an overflow"
    assert "step 2 (epoch 0, batch 2) is nan: it began in network.enter, where the parameter network.enter.weight was" in late
    assert "began in network.blocks.2.gate, in its output" in compiled
    assert "began in training_step, after all modules" in drawn
    assert "microbatch 0 of 2" in drawn, "the same random numbers are drawn again: others would hit another one"
    assert off == "trained"


def undefined_once(module: pl.LightningModule) -> pl.LightningModule:
    """Let the loss of the second step be undefined, and not when it is run again."""

    class Once(type(module)):  # type: ignore[misc]
        has_been = False

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(batch, batch_idx)
            if batch_idx == 1 and not self.has_been:
                self.has_been = True
                return loss * torch.nan
            return loss

    module.__class__ = Once
    return module


def _well(rank: int, world_size: int, layout: str) -> dict[str, str]:
    data = [make_batch(step, ROWS) for step in range(STEPS)]
    return {name: message(undefined_once(make()), data, layout, world_size) for name, make in MODELS.items()}


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_nothing_is_found_in_models_where_all_is_well(layout: str) -> None:
    """Masks of minus infinity, padded vocabularies, placeholders of other stages and caches are no anomalies."""
    for name, found in run_ranks(_well, 2, layout, timeout=200)[0].items():
        assert found == (
            "the loss of step 1 (epoch 0, batch 1) is nan: run again, it is finite: the step is not repeatable; "
            "detect_anomaly=null goes on regardless"
        ), name


class Partly(Guarded):
    """A mean over what a batch says is to be kept: undefined in a microbatch that keeps nothing."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return (super().training_step(batch, batch_idx) * batch["keep"]).sum() / batch["keep"].sum()


def count_kept(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["keep"].sum()


def _partly(rank: int, world_size: int) -> list[str]:
    data = [{**batch, "keep": torch.tensor([0.0, 0.0, 1.0, 1.0])} for batch in batches(ROWS)]
    return [
        message(Partly(plant), data, "pp2_mb2", world_size, strategy={"loss_weight": count_kept}, **CLIP)
        for plant in ("", "loss", "backward")
    ]


def test_a_microbatch_that_counts_for_nothing_is_not_blamed() -> None:
    well, loss, backward = run_ranks(_partly, 2)[0]
    assert well == "trained"
    assert "began in training_step" in loss and "microbatch 1 of 2" in loss
    assert "began in the backward of network.blocks.2" in backward and "microbatch 1 of 2" in backward


class Overflowing(Guarded):
    """Microbatches with finite gradients whose sum is infinite."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        bias = self.network.norm.bias
        return super().training_step(batch, batch_idx) + (bias.sum() - bias.detach().sum()) * torch.finfo(torch.float32).max


def _overflowing(rank: int, world_size: int) -> str:
    return message(Overflowing(), batches(ROWS), "single", 1, accumulate_grad_batches=2, **CLIP)


def test_a_sum_of_gradients_that_overflows_is_no_module_s() -> None:
    assert run_ranks(_overflowing, 1) == [
        "the gradient norm of step 0 (epoch 0, batch 1) is inf, and its loss is finite: a sum of finite gradients is not; "
        "detect_anomaly=null goes on regardless"
    ]


READS = ("item", "tolist", "__float__", "__int__", "__bool__")  # the host waits for a GPU in each
COUNTED = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "broadcast",
    "broadcast_object_list",
    "barrier",
)


class Counted(pl.Callback):
    """How many hooks there are while training."""

    def __init__(self) -> None:
        self.hooks: list[int] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.hooks.append(num_hooks(pl_module))


def _costs(rank: int, world_size: int, layout: str) -> list[Any]:
    calls = Counter[str]()

    def noting(owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return mock.patch.object(owner, name, function)

    costs = []
    with ExitStack() as stack:  # around both runs: DeepSpeed keeps what it finds first
        for owner, name in [(dist, name) for name in COUNTED] + [(torch.Tensor, name) for name in READS]:
            stack.enter_context(noting(owner, name))
        for word in ("first", None):
            counted = Counted()
            calls.clear()
            fit(Guarded(), batches(ROWS), layout, world_size, {"detect_anomaly": word}, callbacks=[counted])
            costs.append((counted.hooks, dict(calls)))
    return costs


@pytest.mark.parametrize("layout", ["pp2_mb2", "tp2", "dp2_zero1"])
def test_while_all_is_well_it_costs_nothing(layout: str) -> None:
    for with_guard, without in run_ranks(_costs, 2, layout):
        assert with_guard == without
        assert with_guard[1]["all_reduce"] >= STEPS and with_guard[1]["tolist"] >= STEPS, "they are counted"


def test_masks_are_right_and_other_infinities_are_not() -> None:
    mask = torch.zeros(2, 2).masked_fill(torch.ones(2, 2).triu(1).bool(), -torch.inf)
    assert not has_bad({"mask": mask, "tokens": torch.arange(3)})
    assert has_bad([mask], masks=False)
    assert has_bad((mask.clone().requires_grad_(),))
    assert has_bad(-mask) and has_bad(mask * 0) and has_bad(torch.tensor([1.0, torch.nan], dtype=torch.bfloat16))


def test_the_earliest_finding_wins_and_all_that_have_it_are_named() -> None:
    early, late = Finding((0, 0, 1, 5), "a", "output", "", 0), Finding((0, 1, 0, 1), "b", "batch", "x", 1)
    assert first_of({0: late, 1: early, 2: None, 3: early}) == (early, [1, 3])
    assert first_of({0: None}) is None
    layout = parse_layout("dp8")
    assert describe_ranks([1], layout) == "rank 1 (pp 0, dp 1, tp 0)"
    assert describe_ranks(range(8), layout).endswith("rank 3 (pp 0, dp 3, tp 0) and 4 more")
    assert "more" not in describe_ranks(range(4), layout)


def test_a_row_without_split_backwards_sends_the_same() -> None:
    row = (Action("F", 0, 0), Action("I", 0, 0), Action("F", 0, 1), Action("W", 0, 0), Action("B", 0, 1))
    assert without_split(row) == (Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1))


def test_a_word_that_is_unknown_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=re.escape("detect_anomaly=all is unknown: use first, or null to go on with")):
        HybridParallelStrategy("pp2", detect_anomaly="all")
