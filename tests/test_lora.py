"""LoRA adapters of PEFT train in every layout as in one process: base layers split, frozen shards without gradients."""

from __future__ import annotations

from typing import Any

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import peft
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM  # noqa: F401

from lightning_par import HybridParallelStrategy
from lightning_par.layout import parse_layout
from tests.models import TransformersModel, llama, make_batch
from tests.parity import Steps, check_parity, fit
from tests.planning import kinds, plan_of
from tests.ranks import run_ranks

PARTS = ("base_layer", "lora_A.default", "lora_B.default")


class Adapted(TransformersModel):
    """Trains what requires a gradient, as the documentation of PEFT shows.

    The rate is a tenth of the other models': at theirs rounding grows thirtyfold from step to step, in any order of its sums.
    """

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3, eps=1e-4)


def lora(dropout: float = 0.0, **options: Any) -> pl.LightningModule:
    """Adapters on all projections, both factors away from zero: at the start one of them has no gradient."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, init_lora_weights=False, **options)
    return Adapted(peft.get_peft_model(llama().model, config))


@pytest.mark.parametrize("word", ["tp2_pp2_dp2_zero2", "tp2", "pp2_dp2_zero3"])
def test_adapters_train_as_in_one_process(word: str) -> None:
    check_parity({"lora": lora}, word)


def test_base_layers_are_split_as_without_adapters() -> None:
    """The factor next to the split side goes with the base layer; the other one, a thin matrix, is whole."""
    batch = make_batch(0, 8)
    plain, adapted = kinds(plan_of(llama(), "tp2", batch)), kinds(plan_of(lora(), "tp2", batch))
    for name, kind in plain.items():
        if kind == "column" and f"{name}.base_layer" in adapted:
            assert [adapted[f"{name}.{part}"] for part in PARTS] == ["column", "replicate", "column"], name
        elif kind == "row":
            assert [adapted[f"{name}.{part}"] for part in PARTS] == ["row", "row", "replicate"], name
    assert sum(name.endswith("base_layer") for name in adapted) == 7


def train_and_count(rank: int, world_size: int, word: str) -> tuple[set[str], int, int]:
    """Names with a gradient after the backwards of a step; elements that are trained here, and those that the optimizer holds."""
    layout = parse_layout(word).resolve(world_size)
    strategy = HybridParallelStrategy(layout, print_plan=False)
    loader = DataLoader(Steps(2, layout.coordinate_of(rank).dp), batch_size=None)
    _, module, run = fit(lora, loader, strategy=strategy, devices=world_size)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    states: Any = strategy.states
    held = sum(master.numel() for master in states.engine.masters)
    states.close()
    return set(run.gradients), trained, held


def test_frozen_shards_take_no_memory_for_gradients_and_states() -> None:
    for names, trained, held in run_ranks(train_and_count, 4, "tp2_dp2_zero2"):
        assert names and all("lora_" in name for name in names)
        assert held == trained / 2
