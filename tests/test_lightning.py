"""A LightningModule as it is, under the stock Trainer in one process and under the strategy in four: the same run."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_par.errors import ConfigurationError
from lightning_par.host.strategy import HybridParallelStrategy
from tests.models import LENGTH, VOCABULARY, EncoderBlock
from tests.ranks import run_ranks

ROOTS = ("pytorch_lightning", "lightning.pytorch")
LIGHTNING = {root: import_module(root) for root in ROOTS}
LAYOUT = "tp2_pp2"
CLASSES, BATCH = 5, 6  # 6 samples in 4 microbatches: 2, 2, 1, 1

# what each case adds to the Trainer
CASES: dict[str, dict[str, Any]] = {
    "early stopping": {"max_epochs": 4},  # in both namespaces; the rest in the first
    "accumulate and clip by norm": {"max_epochs": 1, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "clip by value": {"max_epochs": 1, "gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
}


def samples(count: int, seed: int) -> Any:
    """Token sequences of mixed lengths, 0 for padding, with a class each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    tokens[torch.arange(LENGTH) >= torch.randint(4, LENGTH + 1, (count, 1), generator=generator)] = 0
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return [{"tokens": each, "label": label} for each, label in zip(tokens, labels, strict=True)]


def user_module(root: str) -> Any:
    """A classifier with nothing about parallelism in it."""

    class Classifier(LIGHTNING[root].LightningModule):  # type: ignore[misc]
        def __init__(self, width: int = 32) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.randn(1, LENGTH, width) * 0.1)
            self.blocks = nn.ModuleList([EncoderBlock(width, 4, 0.0) for _ in range(2)])
            self.classify = nn.Linear(width, CLASSES)
            self.accuracy, self.val_accuracy = MulticlassAccuracy(CLASSES, average="micro"), MulticlassAccuracy(CLASSES)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            mask = tokens != 0
            x = self.tokens(tokens) + self.positions[:, : tokens.size(1)]
            for block in self.blocks:
                x = block(x, mask)
            logits: torch.Tensor = self.classify((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
            return logits

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            self.log("padding", (batch["tokens"] == 0).float().mean(), on_epoch=True)
            logits = self(batch["tokens"])
            loss = F.cross_entropy(logits, batch["label"])
            self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            self.log_dict({"logit": logits.abs().sum(), "seen": float(len(logits))}, reduce_fx="sum", on_step=True, on_epoch=True)
            self.accuracy(logits, batch["label"])
            self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
            logits = self(batch["tokens"])
            self.log("val_loss", F.cross_entropy(logits, batch["label"]), prog_bar=True, sync_dist=True)
            self.val_accuracy.update(logits, batch["label"])
            self.log("val_accuracy", self.val_accuracy)

        def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
            logits = self(batch["tokens"])
            return {"logits": logits, "class": logits.argmax(-1)}

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4)  # eps: see tests.models.adamw
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    torch.manual_seed(3)
    return Classifier()


def make_trainer(
    root: str, world_size: int, folder: Path, layout: str = LAYOUT, **options: Any
) -> tuple[Any, list[dict[str, float]]]:
    """A Trainer, stock in one process, and the list in which it leaves what each batch logged."""
    pl: Any = LIGHTNING[root]
    seen: list[dict[str, float]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append(numbers({**trainer.progress_bar_metrics, **trainer.logged_metrics, **trainer.callback_metrics}))

    # the script of a user imports one of the two namespaces
    strategy = eval(
        "HybridParallelStrategy(layout, monitor=False)",
        {"pl": pl, "HybridParallelStrategy": HybridParallelStrategy, "layout": layout},
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="auto" if world_size == 1 else strategy,
        logger=pl.loggers.CSVLogger(folder),
        log_every_n_steps=1,
        callbacks=[
            Watch(),
            pl.callbacks.LearningRateMonitor("step"),
            pl.callbacks.ModelCheckpoint(
                folder / "checkpoints", monitor="val_loss", filename="{epoch}-{step}-{val_loss:.2f}", save_top_k=-1
            ),
            pl.callbacks.EarlyStopping("val_loss", mode="max", patience=1),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    return trainer, seen


def run_cases(rank: int, world_size: int, root: str, folder: Path) -> dict[str, Any]:
    """Fit, validate and predict in every case; what the Trainer of this rank knows of each."""
    train, validation = DataLoader(samples(4 * BATCH, 0), BATCH), DataLoader(samples(2 * BATCH - 1, 1), BATCH)
    known = {}
    for name, options in CASES.items() if root == ROOTS[0] else [("early stopping", CASES["early stopping"])]:
        trainer, seen = make_trainer(root, world_size, folder / name, use_distributed_sampler=False, **options)
        module = user_module(root)
        trainer.fit(module, train, validation)
        known[name] = {
            "seen": [*seen, numbers(trainer.callback_metrics), *trainer.validate(module, validation, verbose=False)],
            "ended": (trainer.current_epoch, trainer.global_step, sorted(os.listdir(folder / name / "checkpoints"))),
            "predictions": arrays(trainer.predict(module, validation)),
        }
    known["resumed"] = resume(root, world_size, folder, train, validation)
    return known


def resume(root: str, world_size: int, folder: Path, train: Any, validation: Any) -> dict[str, Any]:
    """The first case again, from the checkpoint after its first epoch."""
    name = "early stopping"
    first = next(path for path in (folder / name / "checkpoints").iterdir() if path.name.startswith("epoch=0"))
    trainer, seen = make_trainer(root, world_size, folder / "resumed", use_distributed_sampler=False, **CASES[name])
    module = user_module(root)
    trainer.fit(module, train, validation, ckpt_path=str(first))
    return {
        "seen": [*seen, numbers(trainer.callback_metrics)],
        "ended": (trainer.current_epoch, trainer.global_step),
        "predictions": arrays(trainer.predict(module, validation)),
    }


def arrays(predictions: list[dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """Predictions of all batches; arrays, because tensors cannot leave a process that ends."""
    return {key: torch.cat([output[key] for output in predictions]).numpy() for key in predictions[0]}


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("root", ROOTS)
def test_the_same_run_as_the_stock_trainer(root: str, tmp_path: Path) -> None:
    (expected,) = run_ranks(run_cases, 1, root, tmp_path / "stock")
    assert expected["early stopping"]["ended"][:2] == (2, 8)  # stopped by the callback, before the 4th epoch
    for rank, got in enumerate(run_ranks(run_cases, 4, root, tmp_path / LAYOUT)):
        for name, wanted in expected.items():
            case = f"{name}, rank {rank}"
            assert got[name]["ended"] == wanted["ended"], case
            for table, stock in zip(got[name]["seen"], wanted["seen"], strict=True):
                assert table == pytest.approx(stock, rel=2e-4, abs=2e-5), case
            for key, stock in wanted["predictions"].items():
                np.testing.assert_allclose(got[name]["predictions"][key], stock, rtol=2e-3, atol=2e-4, err_msg=case)
        uninterrupted, resumed = got["early stopping"], got["resumed"]
        for table, whole in zip(resumed["seen"], uninterrupted["seen"][4:], strict=False):
            assert table.items() <= whole.items()  # to the last bit; the uninterrupted run still shows its first epoch's means
        for key, prediction in uninterrupted["predictions"].items():
            np.testing.assert_array_equal(resumed["predictions"][key], prediction)


def read_by_replicas(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Validate and train with the sampler that Lightning adds; the samples that this rank was given, by their first tokens."""
    given: list[tuple[int, ...]] = []

    class Given(LIGHTNING[ROOTS[0]].Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, module: Any, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
            given.extend(tuple(row) for row in batch["tokens"][:, :4].tolist())

    trainer, _ = make_trainer(ROOTS[0], world_size, folder, "pp2_dp2", max_epochs=1)
    trainer.callbacks.append(Given())
    module, loader = user_module(ROOTS[0]), DataLoader(samples(4 * BATCH, 0), BATCH)
    (validated,) = trainer.validate(module, loader, verbose=False)
    trainer.fit(module, loader, loader)
    return {"validated": validated, "given": given, "fitted": numbers(trainer.callback_metrics)}


def test_replicas_read_different_samples_and_know_the_same(tmp_path: Path) -> None:
    (stock,) = run_ranks(read_by_replicas, 1, tmp_path / "stock")
    ranks = run_ranks(read_by_replicas, 4, tmp_path / "dp2")  # ranks 0 and 2 are replica 0
    assert ranks[0]["given"] == ranks[2]["given"] and ranks[1]["given"] == ranks[3]["given"]
    assert sorted(ranks[0]["given"] + ranks[1]["given"]) == sorted(stock["given"])
    for rank in ranks:
        assert rank["validated"] == pytest.approx(stock["validated"], rel=1e-5)
        assert rank["fitted"] == ranks[0]["fitted"]


def refused_precision(rank: int, world_size: int) -> None:
    for root in ROOTS:
        with pytest.raises(ConfigurationError, match="precision=16-true is not supported"):
            make_trainer(root, world_size, Path("nowhere"), precision="16-true")


def test_another_precision_is_refused() -> None:
    run_ranks(refused_precision, 4)
