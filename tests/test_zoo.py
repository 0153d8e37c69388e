"""The promise on models that nobody prepared; see `tests.zoo`."""

from __future__ import annotations

import logging

import pytest
import torch

from lightning_par.install import install_tensor_parallel
from lightning_par.runtime.axis import LocalAxis
from lightning_par.trace import trace_step
from tests.matrix import MATRIX, SEQUENCES
from tests.models import make_batch
from tests.parity import check_parity
from tests.planning import layer_of, plan_of
from tests.zoo import ZOO
from tests.zoo_written import Decoder, LocalFusedBlock

ODD = ("Bloom", "Albert", "T5", "relative positions", "attention beside MLP", "cross attention")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("pytorch_lightning", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def test_odd_models_equal_one_process() -> None:
    """An autograd function with a backward of its own, blocks run twice, two chains, tables of parameters, fused branches."""
    check_parity({name: ZOO[name] for name in ODD}, "tp2")


@pytest.mark.slow
@pytest.mark.parametrize("word", MATRIX)
def test_unprepared_models_equal_one_process(word: str) -> None:
    check_parity(MATRIX[word], word, timeout=280)


def gathers(name: str, word: str) -> dict[str, int]:
    """What one step of a model gathers over tp where a function has no rule."""
    module, batch = ZOO[name](), make_batch(0, 8)
    plan = plan_of(module, word, batch)
    axis = LocalAxis("tp", plan.layout.tp, 0)
    split = trace_step(module, batch, batch_size=8, prepare=lambda twin: install_tensor_parallel(twin, plan, axis))
    assert split.error is None
    return dict(axis.gathers)


@pytest.mark.parametrize("name", ODD)
def test_odd_models_gather_nothing(name: str) -> None:
    assert gathers(name, "tp2") == {}


@pytest.mark.slow
@pytest.mark.parametrize("word", ["tp2", "tp4"])
@pytest.mark.parametrize("name", [name for name in ZOO if name not in ODD])
def test_nothing_is_gathered(name: str, word: str) -> None:
    assert gathers(name, word) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", SEQUENCES)
def test_nothing_is_gathered_of_cut_sequences(name: str) -> None:
    """But where a model picks the class token, and torch's attention, which is one function."""
    assert gathers(name, "tp2_sp").keys() <= {"__getitem__", "multi_head_attention_forward"}


def test_local_and_global_shapes_of_one_model_equal_one_process() -> None:
    """Code that views by head sizes runs on plain local tensors of itself; told to, it runs on tensors of global shape."""
    torch.manual_seed(0)
    for word, plan in (("local", None), ("global", {"activation": {"blocks.*.qkv": "global", "blocks.*.gate_up": "global"}})):
        chosen = plan_of(Decoder(LocalFusedBlock), "tp2", make_batch(0, 8), plan)
        assert {layer_of(chosen, name).activation for name in ("qkv", "gate_up")} == {word}
        check_parity({word: lambda: Decoder(LocalFusedBlock)}, "tp2", plan=plan)
