"""Notes of the plan on losses and norms that a cut batch changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_par.layout import parse_layout
from lightning_par.prepare import prepare_plan


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


def notes(module: nn.Module, word: str, target: int = 1) -> tuple[str, ...]:
    batch = {"x": torch.randn(8, 4), "y": torch.full((8,), target)}
    layout = parse_layout(word)
    return prepare_plan(module, batch, layout.resolve(layout.world_size)).notes


@pytest.mark.parametrize(
    ("module", "word", "target", "said"),
    [
        (Step(reduction="sum"), "pp2", 1, "cross_entropy sums over its targets"),
        (Step(weight=torch.ones(4)), "pp2", 1, "cross_entropy weighs its targets by class"),
        (Step(), "dp2", -100, "the batch has ignored targets (-100): each of its 2 parts"),
        (Step(norm=True), "dp2", 1, "BatchNorm takes its statistics from each of 2 parts"),
    ],
)
def test_what_a_cut_batch_changes_is_noted(module: nn.Module, word: str, target: int, said: str) -> None:
    assert any(said in note for note in notes(module, word, target))
    assert notes(module, "single", target) == ()


def test_a_plain_mean_needs_no_note() -> None:
    assert notes(Step(), "pp2_dp2") == ()
