"""A chain is taken apart without the blocks that are like another one, and what is found is the same as with all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_par.planner import Anatomy, anatomy
from tests import models
from tests.test_planner import GPT, LanguageModel, samples, take_apart


class Chain(pl.LightningModule):
    """Blocks of given widths, with a head."""

    def __init__(self, widths: tuple[int, ...] = (16,) * 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8)) for width in widths)
        self.head = nn.Linear(8, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        for layer in self.layers:
            batch = layer(batch)
        return self.head(batch).mean()


class Numbered(Chain):
    """Finds its blocks by their numbers, so that none may be missing."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        for index in range(6):
            batch = self.layers[index](batch)
        return self.head(batch).mean()


class Deeper(Chain):
    """Computes something else when it has fewer blocks: its blocks get twice as many samples."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if len(self.layers) < 6:
            batch = batch.repeat(2, 1)
        return super().training_step(batch, batch_idx)


def rows(count: int) -> torch.Tensor:
    return torch.zeros(count, 8)


MODULES: dict[str, Any] = {
    "gpt": (lambda: LanguageModel(GPT(256, 64, 6, 4)), samples),
    "tied": (models.gpt2, lambda count: models.make_batch(0, count)),
    "equal": (Chain, rows),
    "two kinds": (lambda: Chain((16, 32, 16, 32, 16, 32)), rows),
    "numbered": (Numbered, rows),
    "deeper": (Deeper, rows),
}
KEPT = {"gpt": [0, 1, 5], "equal": [0, 1, 5], "two kinds": [0, 1, 2, 5]}


def whole_anatomy(make: Any, samples_of: Any, monkeypatch: pytest.MonkeyPatch) -> Anatomy:
    with monkeypatch.context() as patch:
        patch.setattr(anatomy, "find_likeness", lambda *args: None)
        return take_apart(make(), samples_of)


@pytest.mark.parametrize("name", MODULES)
def test_what_is_found_is_the_same_as_with_all_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, samples_of = MODULES[name]
    mine, its = take_apart(make(), samples_of), whole_anatomy(make, samples_of, monkeypatch)
    if name in KEPT:
        assert mine._likeness is not None and mine._likeness.kept == KEPT[name]
    if name in ("numbered", "deeper"):
        assert mine._likeness is None
    for tp, sp in ((1, False), (2, name == "gpt")):
        short, whole = mine.body(tp, sp, "none"), its.body(tp, sp, "none")
        assert short.parameters == whole.parameters and short.flops == whole.flops
        assert len(short.blocks) == len(whole.blocks)
        for one, other in zip(short.blocks, whole.blocks, strict=True):
            assert one.memory == other.memory and one.sent_bytes == other.sent_bytes
            for kind in ("F", "I", "W"):
                assert one.work[kind].sent(5) == other.work[kind].sent(5)
                assert np.array_equal(one.work[kind]._at(5, *one.work[kind]._ops), other.work[kind]._at(5, *other.work[kind]._ops))


def test_the_module_is_whole_again() -> None:
    module = Chain()
    children = list(module.layers)
    take_apart(module, rows).body(2, False, "none")
    assert list(module.layers) == children and list(module.layers._modules) == [str(number) for number in range(6)]


def test_lines_for_single_blocks_keep_all_of_them() -> None:
    module = Chain()
    plain = take_apart(module, rows)
    single = Anatomy(module, (rows(2), rows(3)), lambda loss: loss, plain.form, overrides={"split": {"layers.3.0": "replicate"}})
    assert single._likeness is None
    assert {spec.name for spec in (each.spec for each in single.body(2, False, "none").parameters) if spec.split is None} > {
        "layers.3.0.weight"
    }
