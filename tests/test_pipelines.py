"""The promise under every pipeline schedule, for models with side inputs, ties, two chains and ragged targets."""

from __future__ import annotations

import logging

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import pytest
import transformers  # noqa: F401

from lightning_par.pipeline.schedules import AUTO, SCHEDULES
from tests.parity import check_parity
from tests.pipelines import LAYOUTS, MODELS, OPTIONS, word_for

NAMES = (*SCHEDULES, AUTO)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("pytorch_lightning", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.mark.parametrize("schedule", NAMES)
def test_every_schedule_equals_one_process(schedule: str) -> None:
    check_parity(MODELS, word_for(schedule, "pp2"), options=OPTIONS, schedule=schedule)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "pp2"])
@pytest.mark.parametrize("schedule", NAMES)
def test_every_schedule_in_every_layout_equals_one_process(schedule: str, layout: str) -> None:
    check_parity(MODELS, word_for(schedule, layout), timeout=280, options=OPTIONS, schedule=schedule)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["tp2_pp2_vp2_dp2_zero1", "pp2_vp2_dp2_zero3", "tp2_pp2_sp"])
def test_stages_of_a_rank_with_every_other_axis(word: str) -> None:
    models = {name: make for name, make in MODELS.items() if "sp" not in word.split("_") or name in ("gpt", "llama", "gpt2")}
    check_parity(models, word, timeout=280, options=OPTIONS)
