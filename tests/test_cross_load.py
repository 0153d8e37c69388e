"""A checkpoint of any layout goes on in any other: equal weights and moments to the last bit, and the steps that would have been.

The run that never stopped is the one process; what is read is compared with what was written as whole tensors, and with what each
rank holds by `Split.shard`, which the checkpoint code does not use.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_par.checkpoint import Checkpoint
from lightning_par.host.strategy import HybridParallelStrategy
from lightning_par.layout import Layout, parse_layout
from lightning_par.runtime.parameter import get_spec
from tests.models import gpt, gpt2, make_batch
from tests.parity import TOLERANCE, MakeModel, fit, kept
from tests.ranks import run_ranks

BATCH, STEPS = 16, 3
Weights = dict[str, torch.Tensor]
MAKERS: dict[str, MakeModel] = {"gpt": gpt, "gpt2": gpt2}
LAYOUTS = (
    "tp1",
    "tp2_mb2",
    "pp2_mb4",
    "dp4_zero0",
    "tp2_pp2_dp2_zero1_mb2",
    "pp2_vp2_dp2_zero2_mb4",
    "tp2_dp2_zero3",
    "tp2_pp2_dp2_zero3_mb2",
)


class Batches(Dataset[dict[str, torch.Tensor]]):
    """The same global batches for every layout, of which a replica has its part; three are an epoch."""

    def __init__(self, layout: Layout, rank: int) -> None:
        self.size = BATCH // (layout.dp or 1)
        self.start = layout.coordinate_of(rank).dp * self.size

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        if step >= STEPS:
            raise IndexError(step)
        return {key: value[self.start :][: self.size] for key, value in make_batch(step, BATCH).items()}


class SavedAgain(pl.Callback):
    """Writes down what was read, before the first step changes it."""

    def __init__(self, path: Path, source: Path) -> None:
        self.path, self.source = path, source

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)
        strategy: Any = trainer.strategy
        written = Checkpoint(self.source)
        names = {name: get_spec(parameter) for name, parameter in pl_module.named_parameters()}
        for name, value in strategy.states.full_parameters():
            spec, tp = names[name], strategy.mesh.tp
            whole = written.read_whole(spec.name)
            part = whole if spec.split is None else spec.split.shard(whole, tp.size, tp.coordinate)
            assert torch.equal(value.view(part.shape), part), name


def resolved(word: str) -> Layout:
    layout = parse_layout(word)
    return layout.resolve(layout.world_size)


def train(rank: int, layout: Layout, make: MakeModel, epochs: int, **options: Any) -> tuple[pl.Trainer, list[float], Weights]:
    """A run of so many epochs: its Trainer, losses and the rank's weights in the end."""
    strategy = HybridParallelStrategy(layout, print_plan=False)
    loader: DataLoader[Any] = DataLoader(Batches(layout, rank), batch_size=None)
    chosen: dict[str, Any] = {"devices": layout.world_size, "max_steps": -1, "max_epochs": epochs, **options}
    trainer, module, run = fit(make, loader, strategy=strategy, **chosen)
    values = zip(module.parameters(), strategy.states.full_parameters(), strict=True)
    return trainer, run.losses, {get_spec(parameter).name: kept(value) for parameter, (_, value) in values}


def write(rank: int, world_size: int, layout: Layout, names: Iterable[str], folder: Path) -> None:
    for name in names:
        trainer, _, _ = train(rank, layout, MAKERS[name], 1)
        trainer.save_checkpoint(folder / name / str(layout))
        strategy: Any = trainer.strategy
        strategy.states.close()


def read(rank: int, world_size: int, layout: Layout, names: Iterable[str], sources: Iterable[Layout], folder: Path) -> Any:
    """Go on from every source; losses and this rank's weights for each."""
    found = {}
    for name in names:
        for source in sources:
            path = folder / name / str(source)
            again = SavedAgain(folder / name / f"{source}-{layout}", path)
            trainer, losses, weights = train(rank, layout, MAKERS[name], 2, ckpt_path=str(path), callbacks=[again])
            strategy: Any = trainer.strategy
            specs = {get_spec(parameter).name: get_spec(parameter) for parameter in trainer.lightning_module.parameters()}
            found[name, str(source)] = losses, {key: value.numpy() for key, value in weights.items()}, specs
            strategy.states.close()
    return found


def alone(rank: int, world_size: int, names: Iterable[str]) -> Any:
    """The run that never stopped, in one process."""
    found = {}
    for name in names:
        _, losses, weights = train(0, resolved("tp1"), MAKERS[name], 2)
        found[name] = losses[STEPS:], {key: value.numpy() for key, value in weights.items()}
    return found


def check_equal(one: Checkpoint, other: Checkpoint) -> None:
    """Every value of every tensor, to the last bit."""
    assert one.index.entries.keys() == other.index.entries.keys()
    for name, entry in one.index.entries.items():
        assert entry.values.keys() == other.index.entries[name].values.keys() >= {"weight"}, name
        for what in entry.values:
            assert torch.equal(one.read_whole(name, what), other.read_whole(name, what)), (name, what)


def check_cross_load(words: Iterable[str], names: Iterable[str], folder: Path) -> None:
    layouts = [resolved(word) for word in words]
    for layout in layouts:
        run_ranks(write, layout.world_size, layout, names, folder, timeout=200)
    (expected,) = run_ranks(alone, 1, names, timeout=200)
    for layout in layouts:
        ranks = run_ranks(read, layout.world_size, layout, names, layouts, folder, timeout=600)
        for (name, source), _ in ranks[0].items():
            case = f"{name}: {source} to {layout}"
            check_equal(Checkpoint(folder / name / source), Checkpoint(folder / name / f"{source}-{layout}"))
            losses, weights = expected[name]
            for rank, found in enumerate(ranks):
                got, held, specs = found[name, source]
                tp = layout.coordinate_of(rank).tp
                assert got == pytest.approx(losses, rel=TOLERANCE), case
                for key, value in held.items():
                    whole, split = torch.from_numpy(weights[key]), specs[key].split
                    part = whole if split is None else split.shard(whole, layout.tp, tp)
                    error = (torch.from_numpy(value).view(part.shape) - part).norm() / part.norm()
                    assert error < TOLERANCE, f"{case}: {key} {error:.1e}"


def test_layouts_read_each_other(tmp_path: Path) -> None:
    check_cross_load(("tp1", "tp2_pp2_dp2_zero1_mb2", "pp2_vp2_dp2_zero2_mb4", "tp2_dp2_zero3"), ["gpt2"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_all_layouts_read_each_other(name: str, tmp_path: Path) -> None:
    check_cross_load(LAYOUTS, [name], tmp_path)
