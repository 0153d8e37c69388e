"""The plan of a Trainer's run, made in the launching process: what a step may ask for, and that nothing is left behind."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_par.host.launch.launcher import _RankLauncher
from lightning_par.host.preflight import leave_inference_mode
from lightning_par.host.strategy import HybridParallelStrategy
from lightning_par.plan import Plan
from tests.planning import Block, Chain, quiet_trainer, tokens


class Started(Exception):
    """The preflight has passed: ranks would be started now."""


class Samples(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": tokens(8)["tokens"][index]}


class Model(Chain):
    def __init__(self) -> None:
        super().__init__(Block)


@pytest.fixture(autouse=True)
def _stop_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any) -> None:
        raise Started

    monkeypatch.setattr(_RankLauncher, "_call_children_scripts", stop)


def plan_of_run(word: str, module: pl.LightningModule, *data: Any, do: str = "fit", **options: Any) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(word, **options)
        with pytest.raises(Started):
            getattr(trainer, do)(module, *data)
    assert isinstance(trainer.strategy, HybridParallelStrategy)
    return trainer.strategy.plan


def loader() -> DataLoader[Any]:
    return DataLoader(Samples(), 4, shuffle=True)


class Curious(Model):
    """Asks for its optimizer and its logger."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        self.log("lr", optimizer.param_groups[0]["lr"])
        experiment: Any = self.logger.experiment if self.logger is not None else None
        experiment.log_metrics({"loss": loss, "epoch": self.current_epoch}, self.global_step)
        return loss


def test_a_step_may_ask_for_its_optimizer_and_its_logger(tmp_path: Any) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    plan = plan_of_run("tp2_pp2", Curious(), loader(), logger=logger)
    assert plan.notes == () and not logger.experiment.metrics


class Manual(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:  # type: ignore[override]
        body, head = self.optimizers()  # type: ignore[misc]
        for optimizer in (body, head):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [{"optimizer": torch.optim.SGD(part.parameters(), lr=0.1)} for part in (self.blocks, self.head)]


def test_manual_optimization_without_a_pipeline() -> None:
    module = Manual()
    before = {name: p.clone() for name, p in module.named_parameters()}
    plan = plan_of_run("tp2", module, loader())
    assert {layer.kind for layer in plan.layers if layer.name.startswith("blocks")} == {"column", "row"}
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in module.named_parameters())


class Late(pl.LightningModule):
    """Makes its data in setup and its layers in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared = 0

    def prepare_data(self) -> None:
        self.prepared += 1

    def setup(self, stage: str) -> None:
        self.samples = Samples()

    def configure_model(self) -> None:
        self.model = Model()

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return self.model.configure_optimizers()


def test_layers_and_data_made_by_hooks() -> None:
    module = Late()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    plan = plan_of_run("tp2_pp2", module)
    assert plan.chain is not None and plan.chain.paths == ("model.blocks",)
    assert module.prepared == 0 and "model" not in module._modules and not hasattr(module, "samples")
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)
        self.samples = Samples()

    def val_dataloader(self) -> Any:
        return [DataLoader(self.samples, 2), DataLoader(self.samples, 8)]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"renamed": batch["tokens"]}


class Validated(Model):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self(batch["renamed"]).mean())


def test_a_datamodule_is_copied_and_its_hooks_run() -> None:
    data = Data()
    plan = plan_of_run("tp2_pp2_mb2", Validated(), data, do="validate")
    assert plan.layout.microbatches == 2 and len(plan.stages) == 2
    assert data.calls == [] and not hasattr(data, "samples")


class Unusual(Model):
    """What only a running Trainer can answer; where no model is cut, nothing is asked."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if not self.trainer.train_dataloader:
            raise RuntimeError("not running yet")
        return super().training_step(batch, batch_idx)


def test_a_dry_run_may_fail_where_no_model_is_cut() -> None:
    plan = plan_of_run("zero2", Unusual(), loader())
    assert {parameter.spec.stages for parameter in plan.parameters} == {(0,)} and plan.layers == ()


@pytest.mark.parametrize("word", ["zero3", "zero2"])
def test_gathered_parameters_are_not_made_in_inference_mode(word: str) -> None:
    trainer = quiet_trainer(f"dp4_{word}")
    leave_inference_mode(trainer)
    loops = (trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    assert {loop.inference_mode for loop in loops} == {word != "zero3"}


class Masked(Model):
    """Reads a mask of all positions."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return (self(batch["tokens"]).mean(-1) @ batch["mask"]).mean()


def test_what_goes_whole_to_every_microbatch_is_noted() -> None:
    batch = {**tokens(8), "mask": torch.ones(6, 6)}
    (note,) = plan_of_run("pp2", Masked(), DataLoader([batch], batch_size=None)).notes
    assert note == "batch['mask'] has 6 rows, and the batch has 8 samples: it goes whole to every microbatch"
    assert plan_of_run("dp4", Masked(), DataLoader([batch], batch_size=None)).notes == ()
