"""What the strategy sees to between the Trainer and the engine: the order of the data, seeds, stages without work."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_par import ConfigurationError, HybridParallelStrategy
from tests.ranks import run_ranks


class Numbers(Dataset[torch.Tensor]):
    """Samples that are their own index."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index))


class Chain(pl.LightningModule):
    """Two blocks; remembers what it was given."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.blocks[0].requires_grad_(not frozen)
        self.seen: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen += batch[:, 0].tolist() if isinstance(batch, torch.Tensor) else []
        for block in self.blocks:
            batch = block(batch)
        return batch.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def _fit(module: Chain, strategy: Any, devices: int, shuffle: bool) -> list[float]:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=devices, max_epochs=1, **quiet)
    trainer.fit(module, DataLoader(Numbers(), batch_size=4, shuffle=shuffle))
    return module.seen


def _orders(rank: int, world_size: int) -> dict[str, list[float]]:
    torch.manual_seed(100 + rank)  # as a script without a seed: every process its own
    return {
        "in order": _fit(Chain(), HybridParallelStrategy("pp2", print_plan=False), world_size, shuffle=False),
        "shuffled": _fit(Chain(), HybridParallelStrategy("pp2", print_plan=False), world_size, shuffle=True),
    }


def test_one_replica_reads_the_data_in_the_order_of_one_process() -> None:
    first, second = run_ranks(_orders, 2)
    assert first["in order"] == [float(index) for index in range(16)]
    assert first == second
    assert sorted(first["shuffled"]) == first["in order"] != first["shuffled"]


def _frozen_stage(rank: int, world_size: int) -> str:
    try:
        _fit(Chain(frozen=True), HybridParallelStrategy("pp2", print_plan=False), world_size, shuffle=False)
    except ConfigurationError as error:
        return str(error)
    except Exception:
        return "ended with its peer"
    return "trained"


def test_a_stage_without_trainable_parameters_is_named() -> None:
    first, _ = run_ranks(_frozen_stage, 2)
    assert first.startswith("stage 0 holds no trainable parameter")
    assert "plan.stages=[...]" in first


def test_workers_are_seeded_by_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = HybridParallelStrategy("tp2_dp2", print_plan=False)
    monkeypatch.setattr(type(strategy), "global_rank", 3)
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    assert strategy.process_dataloader(DataLoader(Numbers())).worker_init_fn.keywords == {"rank": 1}
    assert strategy.process_dataloader([1, 2]) == [1, 2]
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    assert strategy.process_dataloader(DataLoader(Numbers())).worker_init_fn is None


class Named(HybridParallelStrategy):
    """As a user would extend it."""

    def __init__(self, layout: str, *, name: str, **options: Any) -> None:
        super().__init__(layout, **options)
        self.name = name


def test_a_strategy_can_be_subclassed() -> None:
    strategy = Named("tp2_pp2", name="mine", recompute="full", plan={"recompute": {"blocks.0": "none"}})
    assert isinstance(strategy, Named) and isinstance(strategy, pl.strategies.ParallelStrategy) and strategy.name == "mine"
    assert strategy.options.overrides == {"recompute": {"*": "full", "blocks.0": "none"}}


class TwoOptimizers(pl.LightningModule):
    """Manual optimization that takes both backwards before both steps, clipping one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(4, 1), nn.Linear(4, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        first, second = self.optimizers()
        loss_one, loss_two = self.one(batch).square().mean(), (self.two(batch) - 1).square().mean()
        for optimizer in (first, second):
            optimizer.zero_grad()
        self.manual_backward(loss_one)
        self.manual_backward(loss_two)
        self.clip_gradients(first, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        first.step()
        second.step()
        return loss_one + loss_two

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=1e-2) for part in (self.one, self.two)]


def _two_optimizers(rank: int, world_size: int) -> list[float]:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.manual_seed(0)
    module = TwoOptimizers()
    batches = torch.randn(3, 8, 4)
    part = 8 // world_size
    loader: Any = DataLoader([batch[rank * part : (rank + 1) * part] for batch in batches], batch_size=None)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options: dict[str, Any] = {"strategy": HybridParallelStrategy(print_plan=False, layout="dp2")} if world_size > 1 else {}
    trainer = pl.Trainer(accelerator="cpu", devices=world_size, max_epochs=1, use_distributed_sampler=False, **options, **quiet)
    trainer.fit(module, loader)
    return [value for parameter in module.parameters() for value in parameter.flatten().tolist()]


def test_two_optimizers_step_with_the_gradients_of_all_replicas() -> None:
    alone = _two_optimizers(0, 1)
    for found in run_ranks(_two_optimizers, 2):
        assert found == pytest.approx(alone, rel=1e-5)
