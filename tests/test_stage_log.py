"""``self.log`` on the last of several stages, against the stock Trainer in one process on the same data."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from importlib import import_module
from inspect import signature
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError, MetricCollection, MinMaxMetric, SumMetric
from torchmetrics.classification import BinaryAUROC, BinaryF1Score

from lightning_par.errors import ConfigurationError, ReplicaError
from lightning_par.host.batch import split_batch
from lightning_par.host.stage_log import LOG_PARAMETERS, StageLog
from lightning_par.layout import Layout
from lightning_par.runtime.mesh import Mesh
from tests.ranks import run_ranks

ROOTS = ("pytorch_lightning", "lightning.pytorch")
LIGHTNING = {root: import_module(root) for root in ROOTS}
LAYOUTS = {"pp2": Layout(pp=2, dp=1), "pp2_dp2": Layout(pp=2, dp=2), "dp2": Layout(dp=2), "single": Layout(dp=1)}
NUM_MICROBATCHES = 3


class StageExitError(Exception):
    """Ends a training_step where the blocks of this stage end."""


class Blocks(nn.Module):
    """The model: every stage but the last leaves the step here."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.is_last = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_last:
            raise StageExitError
        return x * self.weight


def batches(replica: int, replicas: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """One replica's part of the same four batches of 14 samples: 8 and 6 on two replicas, microbatches of 3, 3, 2 and 2, 2, 2."""
    generator = torch.Generator().manual_seed(seed)
    whole = [{"x": torch.rand(14, generator=generator), "y": torch.randint(0, 2, (14,), generator=generator)} for _ in range(4)]
    cut = slice(0, 14) if replicas == 1 else [slice(0, 8), slice(8, 14)][replica]
    return [{key: value[cut] for key, value in batch.items()} for batch in whole]


def user_module(root: str) -> Any:
    """A LightningModule as a user writes it, logging in every way there is."""

    class UserModule(LIGHTNING[root].LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.blocks = Blocks()
            self.error = MeanSquaredError()
            self.scores = MetricCollection({"f1": BinaryF1Score(), "auroc": BinaryAUROC()}, prefix="val_")
            self.by_hand: Any = nn.ModuleDict({"sum": SumMetric()})

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            self.log("early", float(batch_idx))  # before the model: runs on every stage
            x = self.blocks(batch["x"])
            loss = x.mean()
            self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            self.log("own_size", loss * 2, on_epoch=True, on_step=False, batch_size=len(x), sync_dist=True)
            self.log("highest", x.max(), True, None, True, True, "max")
            self.log_dict({"total": x.sum(), "count": len(x)}, reduce_fx=torch.sum, on_step=True, on_epoch=True)
            self.log("precise", loss.double() / 3, on_epoch=True, logger=False)
            for scale in (1, 2):
                self.log("twice", loss * scale, on_step=True, on_epoch=True)
            if batch_idx % 2:
                self.log("sometimes", x.min(), reduce_fx="min", rank_zero_only=True)
            self.error(x, batch["y"].float())
            self.log("error", self.error, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int) -> dict[str, Any]:
            x = self.blocks(batch["x"])
            self.log("val_loss", x.mean())
            self.log(f"val_{dataloader_idx}", x.mean() + 1, add_dataloader_idx=False, on_step=True, on_epoch=True)
            if dataloader_idx == 0:
                self.scores.update(x, batch["y"])
                self.log_dict(self.scores)
            self.by_hand["sum"].update(x)
            return {"predictions": x}

        def on_validation_epoch_end(self) -> None:
            self.log("by_hand", self.by_hand["sum"].compute())
            self.by_hand["sum"].reset()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.log("hook", float(batch_idx + 1), on_step=True, on_epoch=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    return UserModule()


def stage_strategy(root: str, mesh: Mesh) -> Any:
    """The least strategy that runs a LightningModule in stages: the last one computes, every rank replays the log."""
    strategies = import_module(f"{root}.strategies")

    class StageStrategy(strategies.ParallelStrategy):  # type: ignore[name-defined]
        is_distributed = True
        root_device = torch.device("cpu")

        def _configure_launcher(self) -> None:
            self._launcher = None

        def setup(self, trainer: Any) -> None:
            super().setup(trainer)
            self.lightning_module.blocks.is_last = mesh.is_last_stage
            self.stage_log = StageLog(self.lightning_module, mesh)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self._run_step("training_step", batch, batch_idx)
            return self.lightning_module.blocks.weight.sum()

        def validation_step(self, batch: Any, *args: Any) -> Any:
            self._run_step("validation_step", batch, *args)

        def _run_step(self, name: str, batch: Any, *args: Any) -> None:
            with self.stage_log.step():
                for index, (microbatch, size) in enumerate(split_batch(batch, NUM_MICROBATCHES)):
                    self.stage_log.begin(index, size)
                    try:
                        getattr(self.lightning_module, name)(microbatch, *args)
                    except StageExitError:
                        assert not mesh.is_last_stage

        def set_world_ranks(self) -> None:
            self.cluster_environment.set_world_size(dist.get_world_size())
            self.cluster_environment.set_global_rank(mesh.rank)
            rank_zero_only.rank = mesh.rank  # type: ignore[attr-defined]

        def model_to_device(self) -> None: ...

        def barrier(self, name: str | None = None) -> None:
            dist.barrier()

        def broadcast(self, obj: Any, src: int = 0) -> Any:
            box = [obj]
            dist.broadcast_object_list(box, src=src)
            return box[0]

        def reduce(self, tensor: Any, group: Any = None, reduce_op: str = "mean") -> torch.Tensor:
            total = torch.as_tensor(tensor).clone()
            dist.all_reduce(total)
            return total / dist.get_world_size() if reduce_op == "mean" else total

        def teardown(self) -> None:
            self.stage_log.close()
            super().teardown()

    return StageStrategy()


def fit(rank: int, world_size: int, root: str, name: str, folder: str) -> dict[str, Any]:
    """Train in a layout, or in one process with the stock strategy; everything that Lightning knows of the logged values."""
    torch.manual_seed(0)
    pl = LIGHTNING[root]
    is_stock = name == "stock"
    layout = LAYOUTS["single" if is_stock else name]
    mesh = Mesh(layout, timedelta(seconds=20))
    seen: list[dict[str, float]] = []

    class Watch(pl.Callback):  # type: ignore[name-defined]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append(numbers({**trainer.progress_bar_metrics, **trainer.logged_metrics, **trainer.callback_metrics}))

    callbacks = [
        Watch(),
        pl.callbacks.ModelCheckpoint(folder, monitor="val_1", filename="{epoch}-{val_1:.6f}-{loss:.6f}", save_top_k=-1),
        pl.callbacks.EarlyStopping("val_f1/dataloader_idx_0", patience=1, mode="max"),
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="auto" if is_stock else stage_strategy(root, mesh),
        max_epochs=4,
        logger=pl.loggers.CSVLogger(folder),
        log_every_n_steps=1,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    module = user_module(root)
    data: list[Any] = [batches(mesh.coordinate.dp, mesh.dp.size, seed) for seed in (1, 2, 3)]
    data = [DataLoader(each, batch_size=None) for each in data]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data[0], [data[1], data[2]])
    advice = [str(each.message) for each in caught if "sync_dist" in str(each.message)]
    return {
        "seen": [*seen, numbers(trainer.callback_metrics), *trainer.validate(module, [data[2], data[1]], verbose=False)],
        "ended": (trainer.current_epoch, sorted(os.listdir(folder)), os.path.basename(trainer.checkpoint_callback.best_model_path)),
        "advice": [text for text in advice if "'by_hand'" not in text and "'hook'" not in text],
        "is_restored": "log" not in vars(module),
    }


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def fit_all(rank: int, world_size: int, cases: list[tuple[str, str]], folder: str) -> list[dict[str, Any]]:
    return [fit(rank, world_size, root, name, os.path.join(folder, root, name)) for root, name in cases]


def test_every_rank_knows_what_one_process_logs(tmp_path: Any) -> None:
    every = {root: run_ranks(fit_all, 1, [(root, "stock"), (root, "single")], str(tmp_path))[0] for root in ROOTS}
    assert {"loss_step", "early", "sometimes", "precise", "val_1", "by_hand"} < set(every[ROOTS[0]][0]["seen"][7])
    runs = {root: [("single", single)] for root, (_, single) in every.items()}
    for world_size, cases in ((2, [(ROOTS[0], "pp2"), (ROOTS[0], "dp2"), (ROOTS[1], "pp2")]), (4, [(ROOTS[0], "pp2_dp2")])):
        for results in run_ranks(fit_all, world_size, cases, str(tmp_path)):
            for (root, name), result in zip(cases, results, strict=True):
                runs[root].append((name, result))
    for root, (expected, _) in every.items():
        for name, got in runs[root]:
            assert got["ended"] == expected["ended"] and got["is_restored"] and not got["advice"], name
            for table, wanted in zip(got["seen"], expected["seen"], strict=True):
                assert list(table) == list(wanted), name
                assert table == pytest.approx(wanted, rel=1e-6), name


@pytest.mark.parametrize("root", ROOTS)
def test_positional_arguments_are_those_of_lightning(root: str) -> None:
    assert tuple(signature(LIGHTNING[root].LightningModule.log).parameters)[3:] == LOG_PARAMETERS


WRONG_CALLS: dict[str, Any] = {
    r"'x', reduce_fx=.*only mean, sum, min and max are known: log a torch": lambda module: module.log("x", 1, reduce_fx=torch.std),
    r"self.log\('x', ...\): a str cannot be logged": lambda module: module.log("x", "high"),
    r"self.log\('x', ...\): a tensor of shape \(2,\) cannot be logged": lambda module: module.log("x", torch.ones(2)),
    r"a SumMetric was logged that is no attribute of UserModule": lambda module: module.log("x", SumMetric()),
    r"self.log\('x', ...\) is called with other arguments than": lambda module: log_in_two_ways(module),
}


def log_in_two_ways(module: Any) -> None:
    module.log("x", 1.0)
    module.trainer_log.begin(1, 2)
    module.log("x", 1.0, on_step=True)


def raise_in_step(rank: int, world_size: int) -> None:
    """Every wrong call is refused where it is made, and leaves the module as it was."""
    module = user_module(ROOTS[0])
    log = module.trainer_log = StageLog(module, Mesh(LAYOUTS["single"], timedelta(seconds=20)))
    for message, call in WRONG_CALLS.items():
        with pytest.raises(ConfigurationError, match=message), log.step():
            call(module)
        assert "log" not in vars(module)


def test_wrong_calls_are_refused_where_they_are_made() -> None:
    run_ranks(raise_in_step, 1)


class Unready(SumMetric):
    def compute(self) -> torch.Tensor:
        raise ValueError("no samples yet")


def share_metrics(rank: int, world_size: int) -> None:
    """Metrics that only rank 1, the last of two stages, updates."""
    mesh = Mesh(LAYOUTS["pp2"], timedelta(seconds=20))
    module = nn.ModuleDict({"sum": SumMetric(), "range": MinMaxMetric(SumMetric()), "unready": Unready()})
    metrics: dict[str, Any] = dict(module.items())
    own = {name: metric.compute for name, metric in metrics.items()}
    log = StageLog(module, mesh)
    with log._metrics.local():  # as in a step: the forward of a metric calls compute on the last stage only
        for value in (1.0, 2.0) if mesh.is_last_stage else ():
            metrics["sum"](value)
            metrics["range"].update(value)
            metrics["range"].compute()
    assert metrics["sum"].compute() == 3.0
    assert {key: float(value) for key, value in metrics["range"].compute().items()} == {"raw": 3.0, "max": 3.0, "min": 1.0}
    metrics["sum"].reset()
    assert metrics["sum"].compute() == 0.0
    with pytest.raises(ValueError if mesh.is_last_stage else ReplicaError, match="no samples yet"):
        metrics["unready"].compute()
    metrics["sum"].clone()
    log.close()
    assert all(metrics[name].compute == compute for name, compute in own.items())


def test_a_metric_of_the_last_stage_computes_on_every_rank() -> None:
    run_ranks(share_metrics, 2)
