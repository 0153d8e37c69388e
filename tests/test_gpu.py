"""What a GPU does and a CPU does not: its kernels, streams, generators, allocator and float8 units, in every kind of layout.

All ranks share one GPU, so that a machine with one is enough (see `tests.staged`); run these with ``make test-gpu``.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # here, or each forked rank would import it
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from lightning_par import HybridParallelStrategy, PipelineTimeline
from lightning_par.demo.gpt import GPT
from lightning_par.host.loss import loss_of
from lightning_par.layout import parse_layout
from lightning_par.memory.optimizer import GroupForm, OptimizerForm
from lightning_par.planner import Anatomy
from lightning_par.planner.timing import Bench
from lightning_par.runtime.precision import PRECISIONS
from lightning_par.tensor import Float8Arithmetic, multiply_in_float8
from tests import test_randomness
from tests.models import VOCABULARY, ByteModel, gpt, gpt2, llama, make_batch
from tests.parity import Steps, check_parity, fit, train_rank
from tests.plain import check_precisions, frozen_block
from tests.ranks import DEVICE, in_one_process, machines, run_ranks
from tests.test_float8 import RECIPES, passed
from tests.test_offload import offloaded_and_kept

pytestmark = pytest.mark.gpu

SAME, TIED = {"gpt": gpt, "llama": llama}, {"gpt2": gpt2}


@pytest.fixture(autouse=True)
def _gpu() -> None:
    for name in ("pytorch_lightning", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if DEVICE != "cuda":
        pytest.fail("this test needs a GPU: run it with `make test-gpu`")


def deterministic() -> None:
    """Sums of this process are always in the same order."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)


# ---------------------------------------------------------------------- float32


@pytest.mark.parametrize(
    ("word", "options"),
    [
        ("tp2", {}),
        ("tp2_sp", {"recompute": "selective"}),
        ("pp2", {}),
        ("pp2_vp2", {"schedule": "interleaved-zb"}),
        ("pp2_vp2", {"schedule": "zb-v"}),
        ("dp2_zero1", {}),
        ("dp2_zero2", {}),
        ("dp2_zero3", {}),
        ("tp2_pp2_dp2_zero1", {}),
        ("pp2_dp2_zero3", {"recompute": "full"}),
        ("dp2_zero3", {"zero": {"offload_optimizer": "cpu", "offload_param": "cpu"}}),
        ("tp2_pp2", {"offload_activations": True}),
        ("pp2_dp2_zero3", {"offload_activations": True}),
    ],
    ids=str,
)
def test_training_equals_one_process(word: str, options: dict[str, Any]) -> None:
    check_parity(SAME if "zero" in options or "sp" in word else {**SAME, **TIED}, word, **options)


# ---------------------------------------------------------------------- other precisions


def test_gradients_reduced_at_every_microbatch() -> None:
    words = [f"pp2_dp2_zero{stage}_mb2" for stage in (2, 3)]
    check_precisions(frozen_block, words, ("32-true", "bf16-mixed", "bf16-true"), timeout=200, zero={"reduce": "microbatch"})


@pytest.mark.parametrize("mesh", ["pp2_dp2", "tp2_dp2"])
def test_other_precisions(mesh: str) -> None:
    words = [f"{mesh}_zero{stage}_mb2" for stage in range(4)]
    check_precisions(frozen_block, words, ("bf16-mixed", "bf16-true"), timeout=200)


# ---------------------------------------------------------------------- streams of the host and of random numbers


def offloaded(rank: int, world_size: int) -> None:
    deterministic()
    offloaded_and_kept(rank, world_size, ("tp2_sp", "pp2"))


def test_activations_that_waited_on_the_host_are_the_same_bit_for_bit() -> None:
    run_ranks(offloaded, 2, timeout=150)


def recomputed(rank: int, world_size: int, word: str) -> Any:
    deterministic()
    return test_randomness.recomputed(rank, world_size, word)


def test_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    test_randomness.test_masks_are_equal_where_ranks_hold_the_same_and_differ_elsewhere()
    monkeypatch.setattr(test_randomness, "run_ranks", lambda function, *args: run_ranks(recomputed, *args))
    test_randomness.test_recomputation_draws_the_same_masks("tp2_pp2_mb2_sp")


# ---------------------------------------------------------------------- float8


def multiplied(rank: int, world_size: int) -> None:
    for recipe in RECIPES:
        for bias in (True, False):
            torch.manual_seed(0)
            mine, theirs = (nn.Sequential(nn.Linear(64, 128, bias, dtype=torch.bfloat16)).cuda() for _ in range(2))
            theirs.load_state_dict(mine.state_dict())
            x = (torch.randn(3, 16, 64) * torch.logspace(-2, 2, 64)).bfloat16().cuda()
            multiply_in_float8(mine, ["0"], Float8Arithmetic(recipe, emulate=False))
            convert_to_float8_training(theirs, config=Float8LinearConfig.from_recipe_name(recipe))  # type: ignore[arg-type]
            for ours, wanted in zip(passed(mine, x), passed(theirs, x), strict=True):
                assert torch.equal(ours, wanted), f"{recipe}, bias {bias}: {(ours - wanted).abs().max()}"


def test_a_layer_computes_in_float8_what_torchaos_own_does() -> None:
    run_ranks(multiplied, 1)


def losses_by_recipe(rank: int, world_size: int, word: str) -> dict[str, list[float]]:
    layout, trainer = parse_layout(word).resolve(world_size), {"precision": "bf16-mixed", "max_steps": 3}
    return {
        str(recipe): train_rank(llama, layout, rank, trainer=trainer, **({} if recipe is None else {"fp8": recipe})).losses
        for recipe in (None, *RECIPES)
    }


@pytest.mark.parametrize("word", ["tp2", "pp2_mb2"])
def test_float8_trains_as_bfloat16_does_but_for_its_rounding(word: str) -> None:
    for found in run_ranks(losses_by_recipe, 2, word):
        plain = torch.tensor(found.pop("None"))
        for recipe, ours in found.items():
            error = float((torch.tensor(ours) - plain).abs().max() / plain.abs().max())
            assert 0 < error < 0.02, f"{recipe}: {error}"


# ---------------------------------------------------------------------- time and memory


def recorded(rank: int, world_size: int, folder: Path) -> list[str]:
    strategy = HybridParallelStrategy("pp2_mb4", print_plan=False)
    callback = PipelineTimeline(steps=[1, 2], folder=folder)
    loader: DataLoader[Any] = DataLoader(Steps(1, 0), batch_size=None)
    fit(gpt, loader, callbacks=[callback], strategy=strategy, **machines(2))
    return sorted(path.name for path in folder.iterdir()) if rank == 0 else []


def test_a_timeline_by_the_devices_own_clock(tmp_path: Path) -> None:
    files, _ = run_ranks(recorded, 2, tmp_path)
    assert files


class Large(ByteModel):
    """What its blocks save is most of what it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = GPT(vocab_size=VOCABULARY, width=256, depth=8, heads=4)


def long_rows(step: int, rows: int) -> dict[str, torch.Tensor]:
    return {"tokens": torch.randint(VOCABULARY, (rows, 1025))}


def most_memory(rank: int, world_size: int) -> dict[str, int]:
    layout, found = parse_layout("single").resolve(1), {}
    for name, options in {"none": {}, "full": {"recompute": "full"}, "offload": {"offload_activations": True}}.items():
        torch.cuda.reset_peak_memory_stats()
        strategy = HybridParallelStrategy(layout, print_plan=False, **options)
        fit(Large, DataLoader(Steps(1, 0, long_rows), batch_size=None), strategy=strategy, **machines(1))
        found[name] = torch.cuda.max_memory_allocated()
    return found


def test_recomputed_and_offloaded_activations_do_not_stay_on_the_gpu() -> None:
    (found,) = run_ranks(most_memory, 1)
    assert found["full"] < 0.5 * found["none"] and found["offload"] < 0.5 * found["none"], found


# ---------------------------------------------------------------------- calibration


def timed_blocks(precision: str) -> list[float]:
    module = gpt()
    form = OptimizerForm((GroupForm(frozenset(name for name, _ in module.named_parameters()), 8, 4),))
    anatomy = Anatomy(module, (make_batch(0, 2), make_batch(0, 3)), loss_of, form, PRECISIONS[precision])
    bench = Bench(anatomy, torch.device("cuda", 0), 2**30, lambda rows: make_batch(0, rows), lambda words: None)
    return [seconds for series in bench.time(2, 10.0).series.values() for seconds in series.seconds.values()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_blocks_are_timed(precision: str) -> None:
    found = in_one_process(timed_blocks, precision)
    assert found and all(0 < seconds < 1 for seconds in found)
