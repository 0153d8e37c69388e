"""Lightning's own ways to checkpoints, on our folders: callbacks, words for paths, hooks, weights alone, other precisions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_par.checkpoint import Checkpoint
from lightning_par.errors import CheckpointError
from lightning_par.host.strategy import HybridParallelStrategy
from lightning_par.runtime.parameter import get_spec
from tests.ranks import run_ranks

WIDTH, ROWS, WORLD = 8, 32, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("running", torch.rand(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.down(self.up(x).relu()))  # type: ignore[no-any-return]


class Odd:
    """Only a pickle can hold it."""

    def __init__(self, count: int) -> None:
        self.count = count


class Model(pl.LightningModule):
    """A chain with statistics of batches, hyperparameters, and values of its own in checkpoints."""

    def __init__(self, lr: float = 0.05, optimizer: str = "AdamW", blocks: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("passing", torch.ones(1), persistent=False)
        self.own: Any = None

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.blocks(batch) - 1).square().mean() * self.scale
        self.log("loss", loss)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = {"set": {1, 2}, "tensor": torch.arange(3), "odd": Odd(self.global_step)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.own = checkpoint["own"]

    def configure_optimizers(self) -> Any:
        optimizer = getattr(torch.optim, self.hparams["optimizer"])(self.parameters(), lr=self.hparams["lr"])
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Counter(pl.Callback):
    """A callback with a state."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def trainer_in(folder: Path, word: str, epochs: int, *callbacks: pl.Callback, precision: Any = None, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=HybridParallelStrategy(word, print_plan=False, **options),
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=list(callbacks),
        precision=precision,
        **quiet,  # type: ignore[arg-type]
    )


def data() -> DataLoader[Any]:
    tensor: Any = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    return DataLoader(tensor, batch_size=8)


def fit(trainer: pl.Trainer, path: Any = None, weights_only: bool | None = None, **options: Any) -> Model:
    torch.manual_seed(0)
    module = Model(**options)
    trainer.fit(module, data(), ckpt_path=path, weights_only=weights_only)
    return module


def weights(trainer: pl.Trainer) -> list[torch.Tensor]:
    strategy: Any = trainer.strategy
    return [value.clone() for _, value in strategy.states.full_parameters()]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kept_by_callbacks(rank: int, folder: Path, word: str, **options: Any) -> None:
    """The best ones and the last one; going on from each by its word; states of callbacks and schedulers."""
    saves = pl.callbacks.ModelCheckpoint(folder / "a", "{epoch}", monitor="loss", mode="max", save_top_k=2, save_last=True)
    counter = Counter()
    whole = trainer_in(folder, word, 3, saves, counter, **options)
    fit(whole)
    assert names_in(folder / "a") == ["epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"]
    first = trainer_in(folder, word, 2, pl.callbacks.ModelCheckpoint(folder / "b", save_last=True), Counter(), **options)
    fit(first)
    again = Counter()
    second = trainer_in(folder, word, 3, pl.callbacks.ModelCheckpoint(folder / "b", save_last=True), again, **options)
    fit(second, "last")
    assert again.count == counter.count == whole.global_step == second.global_step > 0
    assert second.lr_scheduler_configs[0].scheduler.get_last_lr() == whole.lr_scheduler_configs[0].scheduler.get_last_lr()
    for one, other in zip(weights(whole), weights(second), strict=True):
        assert torch.equal(one, other)


def own_values(rank: int, folder: Path, word: str) -> None:
    """Values that the module's hook adds; those that only a pickle can hold when they are trusted."""
    trainer = trainer_in(folder, word, 1)
    fit(trainer)
    trainer.save_checkpoint(folder / "own.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = fit(trainer_in(folder, word, 2), folder / "own.ckpt")
    assert module.own.keys() == {"set", "tensor"} and module.own["set"] == {1, 2} and module.own["tensor"].tolist() == [0, 1, 2]
    said = [str(each.message) for each in caught if "own.odd" in str(each.message)]
    assert len(said) == (rank == 0) and (rank or "can only be unpickled" in said[0])
    assert fit(trainer_in(folder, word, 2), folder / "own.ckpt", weights_only=False).own["odd"].count == 4


def weights_alone(rank: int, folder: Path, word: str) -> None:
    """A checkpoint without optimizer states: tested with, not resumed from."""
    trainer = trainer_in(folder, word, 1, pl.callbacks.ModelCheckpoint(folder / "w", save_weights_only=True, filename="w"))
    fit(trainer)
    entries = Checkpoint(folder / "w" / "w.ckpt").index.entries
    assert {what for entry in entries.values() for what in entry.values} == {"weight"}
    assert "scale" in entries and "passing" not in entries and entries["blocks.1.running"].kind == "buffer"
    with pytest.raises(KeyError, match="contains only the model"):
        fit(trainer_in(folder, word, 2), folder / "w" / "w.ckpt")


def refused(rank: int, folder: Path, word: str) -> None:
    """What does not fit, in words."""
    trainer = trainer_in(folder, word, 1)
    fit(trainer)
    trainer.save_checkpoint(folder / "r.ckpt")
    with pytest.raises(
        CheckpointError, match=r"(?s)r.ckpt does not fit Model:.*missing in the checkpoint: 6\n    blocks.2.down.bias"
    ):
        fit(trainer_in(folder, word, 2), folder / "r.ckpt", blocks=3)
    with pytest.raises(CheckpointError, match=r"has states of AdamW, and configure_optimizers gives SGD: resume"):
        fit(trainer_in(folder, word, 2), folder / "r.ckpt", optimizer="SGD")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of this strategy \(there is nothing\)"):
        fit(trainer_in(folder, word, 2), folder / "none.ckpt")


SCENARIOS = (kept_by_callbacks, own_values, weights_alone, refused)


def run_all(rank: int, world_size: int, folder: Path, word: str) -> None:
    warnings.simplefilter("ignore")
    for scenario in SCENARIOS:
        scenario(rank, folder / scenario.__name__, word)


def test_lightnings_interface(tmp_path: Path) -> None:
    run_ranks(run_all, WORLD, tmp_path, "tp2_pp2_mb2", timeout=200)


def saved_behind(rank: int, world_size: int, folder: Path, words: list[str]) -> None:
    warnings.simplefilter("ignore")
    for word in words:
        kept_by_callbacks(rank, folder / word, word, async_save=True)


def test_in_the_background_too(tmp_path: Path) -> None:
    run_ranks(saved_behind, WORLD, tmp_path, ["tp2_pp2_mb2"], timeout=200)


@pytest.mark.slow
def test_in_the_background_under_zero(tmp_path: Path) -> None:
    run_ranks(saved_behind, WORLD, tmp_path, ["pp2_dp2_zero1_mb2", "pp2_dp2_zero2_mb2", "tp2_dp2_zero3"], timeout=400)


def between_precisions(rank: int, world_size: int, folder: Path) -> None:
    """Masters are kept: bfloat16 weights go on as the float32 ones that they are rounded from, and back."""
    warnings.simplefilter("ignore")
    for index, (first, then) in enumerate((("pp2_dp2_zero1_mb2", "tp2_pp2_mb2"), ("tp2_pp2_mb2", "tp2_dp2_zero3"))):
        path, again, half = (folder / f"{index}{name}.ckpt" for name in ("bf16", "fp32", "again"))
        trainer = trainer_in(folder, first, 1, precision="bf16-true")
        fit(trainer)
        trainer.save_checkpoint(path)
        for source, target, precision in ((path, again, "32-true"), (again, half, "bf16-true")):
            trainer = trainer_in(folder, then, 1, precision=precision)
            fit(trainer, source)  # no epoch is left
            trainer.save_checkpoint(target)
        written = Checkpoint(path)
        assert written.index.entries["blocks.0.up.weight"].dtype == "bfloat16"
        for other in map(Checkpoint, (again, half)):
            for name, entry in written.index.entries.items():
                for what in entry.values:
                    if entry.kind == "parameter":
                        assert torch.equal(written.read_whole(name, what), other.read_whole(name, what)), (name, what)
        strategy: Any = trainer.strategy
        specs = dict(trainer.lightning_module.named_parameters())
        for name, value in strategy.states.full_parameters():
            spec, tp = get_spec(specs[name]), strategy.mesh.tp
            whole = written.read_whole(spec.name)
            part = whole if spec.split is None else spec.split.shard(whole, tp.size, tp.coordinate)
            assert torch.equal(value, part.bfloat16()), name


def test_precisions_read_each_other(tmp_path: Path) -> None:
    run_ranks(between_precisions, WORLD, tmp_path, timeout=200)


class OwnBatches(Model):
    """Statistics that each replica has of its own batches."""

    def on_train_batch_end(self, *args: Any) -> None:
        self.scale.fill_(1.0 + self.trainer.strategy.dp_rank)  # type: ignore[attr-defined, operator]


def statistics(rank: int, world_size: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    trainer = trainer_in(folder, "pp2_dp2_mb2", 1)
    trainer.fit(OwnBatches(), data())
    trainer.save_checkpoint(folder / "s.ckpt")
    strategy: Any = trainer.strategy
    for word in ("pp2_dp2_mb2", "dp4"):
        module, other = OwnBatches(), trainer_in(folder, word, 1)
        other.fit(module, data(), ckpt_path=folder / "s.ckpt")
        replica = other.strategy.dp_rank  # type: ignore[attr-defined]
        assert module.scale.item() == (1.0 + replica if replica < strategy.layout.dp else 1.0)


def test_each_replica_gets_its_own_buffers_back(tmp_path: Path) -> None:
    run_ranks(statistics, WORLD, tmp_path, timeout=100)
