"""The promise: in every layout the same losses, gradients, norms and weights as in one process."""

from __future__ import annotations

import logging

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import pytest
from transformers import Gemma2ForCausalLM, GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401

from tests.models import MODELS
from tests.parity import check_parity

LAYOUTS = (
    "tp2", "pp2", "dp2", "dp2_zero1", "dp2_zero2", "dp2_zero3", "tp2_pp2", "tp2_dp2_zero1", "pp2_dp2_zero2",
    "tp2_pp2_dp2_zero1", "tp2_pp2_dp2_zero3",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("pytorch_lightning", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.mark.parametrize("word", LAYOUTS)
def test_parity_with_one_process(word: str) -> None:
    check_parity(MODELS, word)
