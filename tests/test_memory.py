"""What ranks store: the forecast against real runs, against arithmetic, and the command that compares them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from benchmarks.memory import main
from benchmarks.storage import CASES, KINDS, Case, Row, differences, measure_rank
from benchmarks.storage_table import lines, render_json, render_markdown, render_table
from lightning_par.demo.gpt import GPT
from lightning_par.demo.language_model import LanguageModel
from lightning_par.layout import parse_layout
from lightning_par.memory.forecast import peak_bytes
from lightning_par.memory.living import LivingTensors
from lightning_par.memory.optimizer import GroupForm, OptimizerForm, read_optimizer
from lightning_par.memory.profile import ActionMemory, StageMemory
from lightning_par.memory.states import StateBytes, state_bytes
from lightning_par.pipeline.schedules import build_schedule
from lightning_par.plan import Plan
from lightning_par.prepare import prepare_plan
from lightning_par.zero.option import ZeroOptions
from tests.planning import Block, Chain, tokens
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


# ---------------------------------------------------------------------- real runs


def small() -> pl.LightningModule:
    """Sizes that divide by nothing much: 31 tokens are padded over tp, and partitions over dp."""
    torch.manual_seed(0)
    return LanguageModel(GPT(vocab_size=250, width=24, depth=4, heads=2))


def measure_all(rank: int, world_size: int, cases: tuple[Case, ...], make: Callable[[], pl.LightningModule]) -> list[Row]:
    return [measure_rank(rank, world_size, case, make) for case in cases]


def check_cases(*cases: Case) -> None:
    world_size = parse_layout(cases[0].word).world_size
    for rows in run_ranks(measure_all, world_size, cases, small):
        assert [row.case for row in rows] == [case.name for case in cases]
        assert differences(rows) == []


def test_two_ranks_store_what_the_forecast_says() -> None:
    check_cases(
        Case("tp2_sp"),
        Case("tp2_sp", recompute="selective"),
        Case("tp2_mb2", recompute="selective"),
        Case("pp2_mb4", recompute="full"),
        Case("pp2_vp2_mb4", "interleaved-zb"),
        Case("dp2_zero1"),
        Case("dp2_zero3_mb2"),
        Case("dp2_zero2_mb2", reduce="microbatch"),
    )


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions(precision: str) -> None:
    words = ("tp2_mb2", "pp2_mb4", "dp2", "dp2_zero1", "dp2_zero2_mb2", "dp2_zero3")
    check_cases(*(Case(word, precision=precision) for word in words))


@pytest.mark.slow
def test_more_layouts() -> None:
    check_cases(*(case for case in CASES if parse_layout(case.word).world_size == 1))
    check_cases(*(case for case in CASES if parse_layout(case.word).world_size == 2), Case("pp2_mb4", "zb-h1"))
    sequences = [Case("tp2_pp2_sp", recompute=mode) for mode in ("selective", "full")]
    check_cases(Case("tp2_pp2"), *sequences, Case("pp2_dp2_zero2", "zb-h1"), Case("tp2_dp2_zero3"))
    check_cases(*(Case(word, reduce="microbatch") for word in ("pp2_dp2_zero2", "tp2_sp_dp2_zero2")))


# ---------------------------------------------------------------------- model states


def plan_for(word: str) -> tuple[nn.Module, Plan]:
    module, layout = Chain(Block, depth=2, width=16), parse_layout(word)
    return module, prepare_plan(module, tokens(), layout.resolve(layout.world_size))


def all_in_one_group(module: nn.Module, element_bytes: int = 8, tensor_bytes: int = 4) -> OptimizerForm:
    names = frozenset(name for name, _ in module.named_parameters())
    return OptimizerForm((GroupForm(names, element_bytes, tensor_bytes),))


def states_of(word: str, pp: int = 0, **options: Any) -> StateBytes:
    module, plan = plan_for(word)
    return state_bytes(plan, pp, all_in_one_group(module), ZeroOptions(**options))


BLOCK, TABLE = 16 * 32 + 32 + 32 * 16 + 16, 24 * 16  # elements of a block, and of the embedding or the head
WHOLE = 2 * BLOCK + 2 * TABLE  # in 10 tensors


def test_model_states_are_counted() -> None:
    assert states_of("single") == StateBytes(4 * WHOLE, 4 * WHOLE, 8 * WHOLE + 10 * 4)
    split = 2 * (16 * 16 + 16 + 16 * 16 + 16) + 2 * TABLE // 2  # the bias of the row layer is whole
    assert states_of("tp2") == StateBytes(4 * split, 4 * split, 8 * split + 10 * 4)
    stage = BLOCK + TABLE
    assert states_of("pp2") == states_of("pp2", 1) == StateBytes(4 * stage, 4 * stage, 8 * stage + 5 * 4)


def test_zero_divides_what_its_stage_says() -> None:
    for dp in (2, 3):
        flat = -(-WHOLE // (2 * dp)) * 2 * dp
        for zero in (1, 2):
            assert states_of(f"dp{dp}_zero{zero}") == StateBytes(4 * flat, 4 * WHOLE, 12 * flat // dp + 4)
    sizes = [16 * 32, 32, 32 * 16, 16] * 2 + [TABLE] * 2
    third = sum(-(-size // 3) for size in sizes)
    assert third > WHOLE / 3  # padding counts
    twice_a_block = 4 * (BLOCK + 3 * sum(-(-size // 3) for size in sizes[:4]))
    assert states_of("dp3_zero3") == StateBytes(4 * third, 4 * WHOLE + 4 * third, 12 * third + 4, gathered=twice_a_block)
    assert states_of("dp1_zero3") == states_of("single")


def test_what_is_offloaded_is_not_on_the_device() -> None:
    for zero in (1, 2, 3):
        stored, offloaded = states_of(f"dp2_zero{zero}"), states_of(f"dp2_zero{zero}", offload_optimizer="cpu")
        assert offloaded == replace(stored, gradients=4 * WHOLE, states=0)
    assert states_of("dp2_zero3", offload_param="cpu") == replace(states_of("dp2_zero3"), parameters=0)
    assert states_of("dp2_zero3", offload_optimizer="cpu", reduce="microbatch").gradients == 0


def test_gradients_that_are_reduced_early_are_kept_by_one_rank() -> None:
    assert (
        states_of("dp2_zero2", reduce="microbatch").gradients == states_of("dp2_zero3", reduce="microbatch").gradients == 2 * WHOLE
    )


def test_frozen_parameters_have_no_gradient() -> None:
    module = Chain(Block, depth=2, width=16)
    module.embedding.requires_grad_(False)
    plan = prepare_plan(module, tokens(), parse_layout("single").resolve(1))
    form = read_optimizer(torch.optim.AdamW(module.parameters()), dict(module.named_parameters()))
    assert form is not None
    trained = WHOLE - TABLE
    assert state_bytes(plan, 0, form) == StateBytes(4 * WHOLE, 4 * trained, 8 * trained + 9 * 4)


# ---------------------------------------------------------------------- optimizers


class Needy(torch.optim.SGD):
    """Cannot step without the loss."""

    def step(self, closure: Any = None) -> Any:
        return closure()


def test_an_optimizer_is_read_off_what_it_keeps() -> None:
    module = Chain(Block, depth=1)
    named, parameters = dict(module.named_parameters()), list(module.parameters())
    expected = {
        torch.optim.AdamW(parameters): (8, 4),
        torch.optim.Adam(parameters, amsgrad=True): (12, 4),
        torch.optim.SGD(parameters, lr=1): (0, 0),
        torch.optim.SGD(parameters, lr=1, momentum=0.9): (4, 0),
        torch.optim.Adagrad(parameters): (4, 4),
    }
    for optimizer, (element_bytes, tensor_bytes) in expected.items():
        state = {parameter: dict(kept) for parameter, kept in optimizer.state.items()}
        assert read_optimizer(optimizer, named) == OptimizerForm((GroupForm(frozenset(named), element_bytes, tensor_bytes),))
        assert optimizer.state.keys() == state.keys() and all(parameter.grad is None for parameter in parameters)
    for optimizer in (torch.optim.Adafactor(parameters), torch.optim.LBFGS(parameters), Needy(parameters, lr=1)):
        assert read_optimizer(optimizer, named) is None


def test_groups_of_an_optimizer_are_kept_apart() -> None:
    module = Chain(Block, depth=1)
    groups = [{"params": module.blocks.parameters(), "momentum": 0.9}, {"params": [module.head.weight]}]
    form = read_optimizer(torch.optim.SGD(groups, lr=1), dict(module.named_parameters()))
    assert form is not None
    assert [(len(group.names), group.element_bytes) for group in form.groups] == [(4, 4), (1, 0)]


# ---------------------------------------------------------------------- in flight


def memory(kept: int, peak: int, noted: int = 0) -> StageMemory:
    return {
        "F": ActionMemory(0, kept, kept),
        "B": ActionMemory(kept, 0, peak),
        "I": ActionMemory(kept, noted, peak),
        "W": ActionMemory(noted, 0, noted),
    }


def test_rows_of_a_schedule_say_how_many_microbatches_there_are() -> None:
    stages = [memory(100, 130, 60), memory(10, 10, 6), memory(1000, 1000, 600), memory(1, 1)]
    gpipe = build_schedule("gpipe", 4, 1, 8)
    assert [peak_bytes(row, stages) for row in gpipe] == [(800, 830), (80, 80), (8000, 8000), (8, 8)]
    one_f_one_b = build_schedule("1f1b", 4, 1, 8)
    assert [peak_bytes(row, stages) for row in one_f_one_b] == [(400, 430), (30, 30), (2000, 2000), (1, 1)]
    interleaved = build_schedule("interleaved", 2, 2, 4)  # rank 0 has stages 0 and 2
    held, _ = peak_bytes(interleaved[0], stages)
    assert held == max(2 * 1000 + 3 * 100, 2 * 1000 + 2 * 100)


def test_what_is_alive_is_counted_once() -> None:
    before = torch.zeros(100)
    with LivingTensors([before]) as living:
        x = torch.ones(10)
        views = [x.view(2, 5), x[3:], before[:5]]
        assert living.num_bytes() == 40
        y = x * 2
        del x, views
        assert (living.num_bytes(), living.peak_bytes) == (40, 80)
        assert living.num_bytes([y.untyped_storage()._cdata]) == 0
        living.forget_peak()
        y.add_(1)
        assert living.peak_bytes == 40


# ---------------------------------------------------------------------- the command


def made_up() -> list[Row]:
    expected = dict.fromkeys(KINDS, 1000)
    rows = [Row("tp2", rank, {**expected, "activations": 1030}, expected) for rank in range(2)]
    return [*rows, replace(rows[0], case="pp2", measured={**expected, "states": 1004, "activations": 1031})]


@pytest.mark.parametrize(("flags", "render"), [([], render_table), (["--json"], render_json), (["--markdown"], render_markdown)])
def test_the_exit_code_says_whether_the_forecast_is_right(
    flags: list[str], render: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.memory.measure", made_up)
    assert main([*flags, "--png", str(tmp_path / "bars.png")]) == 1
    output = capsys.readouterr()
    assert output.out == render(made_up()) + "\n"
    assert "pp2, rank 0: states are 1,004 bytes; the forecast says 1,000\npp2, rank 0: activations are 1,031 bytes" in output.err
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("benchmarks.memory.measure", lambda: made_up()[:2])
    assert main(flags) == 0
    assert "every rank stores what the forecast says" in capsys.readouterr().err


def test_equal_ranks_have_one_line() -> None:
    assert [line[:2] for line in lines(made_up())] == [("tp2", "0, 1"), ("pp2", "0")]
    assert len(json.loads(render_json(made_up()))["rows"]) == 3


def test_the_results_have_every_layout() -> None:
    measured = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    assert all(f"| {case.name} |" in measured for case in CASES)
