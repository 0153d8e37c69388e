"""Notes of the plan on losses and norms that a cut batch changes."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_par.layout import parse_layout
from lightning_par.prepare import prepare_plan
from tests.models import TransformersModel, llama, make_batch


class Step(nn.Module):
    """One step around two blocks, with the loss as the case says."""

    def __init__(self, norm: bool = False, **loss: object) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.loss = loss

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        hidden = batch["x"]
        for block in self.blocks:
            hidden = block(hidden)
        return F.cross_entropy(self.norm(hidden), batch["y"], **self.loss)  # type: ignore[arg-type]


class Labelled(TransformersModel):
    """Gives its labels to the model, which shifts them."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch["tokens"], labels=batch["labels"]).loss
        return loss


def notes(module: nn.Module, word: str, target: int = 1) -> tuple[str, ...]:
    batch = {"x": torch.randn(8, 4), "y": torch.full((8,), target)}
    layout = parse_layout(word)
    return prepare_plan(module, batch, layout.resolve(layout.world_size)).notes


@pytest.mark.parametrize(
    ("module", "word", "target", "said"),
    [
        (Step(reduction="sum"), "pp2", 1, "cross_entropy sums over its targets"),
        (Step(weight=torch.ones(4)), "pp2", 1, "cross_entropy weighs its targets by class"),
        (Step(), "dp2", -100, "each of its 2 parts counts by its samples, however many targets it has; .* so does loss_weight=y$"),
        (Step(ignore_index=1), "dp2", 1, r"loss_weight={field: y, ignore_index: 1}$"),
        (Step(norm=True), "dp2", 1, "BatchNorm takes its statistics from each of 2 parts"),
    ],
)
def test_what_a_cut_batch_changes_is_noted(module: nn.Module, word: str, target: int, said: str) -> None:
    assert any(re.search(said, note) for note in notes(module, word, target))
    assert notes(module, "single", target) == ()


def test_a_plain_mean_needs_no_note() -> None:
    assert notes(Step(), "pp2_dp2") == ()


def test_targets_that_the_model_shifts_are_noted_so() -> None:
    batch = make_batch(0, 8)
    batch["labels"] = batch["tokens"].masked_fill(batch["tokens"] == 0, -100)
    noted = prepare_plan(Labelled(llama().model), batch, parse_layout("dp2").resolve(2)).notes
    assert any(note.endswith("loss_weight={field: labels, shift: 1}") for note in noted)
    assert prepare_plan(Labelled(llama().model), batch, parse_layout("dp2").resolve(2), counts_targets=True).notes == ()
