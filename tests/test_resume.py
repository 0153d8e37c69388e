"""A run that was stopped anywhere in an epoch and goes on from a checkpoint is the run that was never stopped, bit for bit."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, Subset, get_worker_info

from lightning_par import HybridParallelStrategy
from tests.ranks import run_ranks

ROOTS = ("pytorch_lightning", "lightning.pytorch")
LIGHTNING = {root: import_module(root) for root in ROOTS}
WIDTH = 8


class Noisy(Dataset[torch.Tensor]):
    """Samples that begin with their own index, and go on with noise of every kind."""

    def __init__(self, count: int = 22) -> None:
        self.count, self.rng = count, np.random.default_rng(2)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        sample = torch.full((WIDTH,), float(index))
        sample[1:4] = torch.randn(3)
        sample[4] += random.random()
        sample[5] += float(np.random.rand())
        sample[6] += float(self.rng.random())
        return sample


class Stream(IterableDataset[torch.Tensor]):
    """As many samples, without a length, in an order that is drawn while they are read; each worker reads its share."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        waiting: list[int] = []
        for index in range(first, 22, step):
            waiting.append(index)
            if len(waiting) == 4:
                yield torch.full((WIDTH,), float(waiting.pop(int(torch.randint(4, ())))))
        yield from (torch.full((WIDTH,), float(index)) for index in waiting)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Dropout(0.3), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.drop(self.up(x / 22)).relu())


class Own(Sampler[int]):
    """A sampler that a user wrote, with a generator of its own."""

    def __init__(self, count: int) -> None:
        self.count, self.rng = count, np.random.default_rng(5)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.count):
            yield int(self.rng.integers(self.count))


class Counting(Sampler[int]):
    """A sampler that knows its epoch by itself, and can save it."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


def shuffled(workers: int = 0, **options: Any) -> Callable[[], Any]:
    return lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=workers, **options)


def persistent() -> Any:
    return [DataLoader(Noisy(6), 2, num_workers=1, persistent_workers=True), DataLoader(Noisy(4), 2)]


def subset() -> Any:
    return DataLoader(Subset(Noisy(30), range(22)), 4, shuffle=True, num_workers=2, persistent_workers=True)


def with_generator() -> Any:
    return DataLoader(Noisy(), 4, sampler=RandomSampler(Noisy(), replacement=True, generator=torch.Generator().manual_seed(3)))


@dataclass
class Case:
    """What is read, with which Trainer, and after which batches checkpoints are saved; an epoch has 6 of one replica.

    They are saved when a batch ends; when a validation (``v``) or an epoch (``e``) ends; when an epoch (``s``) or a batch (``b``)
    begins.
    """

    loaders: Callable[[], Any]
    stops: tuple[int | str, ...] = (1, 3, 6, 8)
    options: dict[str, Any] = field(default_factory=dict)
    validation: Callable[[], Any] = lambda: None


CASES = {
    "shuffled": Case(shuffled(), (1, 3, 6, "e6", 8, 12)),
    "workers": Case(shuffled(2), (1, 5, 6, 9)),
    "persistent workers": Case(subset, (2, 6, "e6", 9)),
    "accumulated": Case(shuffled(), (1, 2, 3, 4, 5, 6, 8, 10), {"accumulate_grad_batches": 3}),
    "workers, accumulated": Case(shuffled(2), (2, 7), {"accumulate_grad_batches": 3}),
    "part of an epoch": Case(shuffled(2), (2, 4, "e4", 6), {"limit_train_batches": 4}),
    "until a step": Case(shuffled(), (3, 6, "e6", 7), {"max_epochs": -1, "max_steps": 15}),
    "stream": Case(lambda: DataLoader(Stream(), 4), (1, 3, 6, 8)),
    "stream, workers": Case(lambda: DataLoader(Stream(), 4, num_workers=2), (1, 4, 6, 8)),
    "own sampler": Case(lambda: DataLoader(Noisy(), 4, sampler=Own(22)), (1, 6, 8)),
    "own sampler, workers": Case(lambda: DataLoader(Noisy(), 4, sampler=Own(22), num_workers=2), (3, 6, 8)),
    "sampler with a state": Case(lambda: DataLoader(Noisy(), 4, sampler=Counting(22)), (1, 6, 8)),
    "sampler with a state, workers": Case(lambda: DataLoader(Noisy(), 4, sampler=Counting(22), num_workers=2), (1, 6, 8)),
    "hooks": Case(shuffled(2), ("b0", "b2", "s6", "b6", "b8")),
    "hooks, accumulated": Case(shuffled(), ("b2", "b4", "s6", "b10"), {"accumulate_grad_batches": 3}),
    "generator": Case(with_generator, (2, 7)),
    "two loaders": Case(lambda: [shuffled()(), DataLoader(Noisy(10), 4, shuffle=True)], (1, 3, 4, 6, 8)),
    "two loaders, one without a length": Case(lambda: [shuffled()(), DataLoader(Stream(), 8)], (1, 2, 3, 4, 8)),
    "validation": Case(
        shuffled(), (1, 2, 3, 4, 6, 8, "v2", "v6", "e6"), {"val_check_interval": 2}, lambda: DataLoader(Noisy(6), 2)
    ),
    "validation, workers": Case(shuffled(2), (2, 6, "v6", 9), {}, persistent),
    "reloaded": Case(shuffled(), (2, 6, 9), {"reload_dataloaders_every_n_epochs": 1}),
}


def user_module(root: str, loaders: Callable[[], Any], seed: int) -> Any:
    """Two blocks with dropout."""

    class Module(LIGHTNING[root].LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def train_dataloader(self) -> Any:
            return loaders()

        def step(self, batch: Any) -> torch.Tensor:
            x: torch.Tensor = torch.cat(batch) if isinstance(batch, list) else batch
            for block in self.blocks:
                x = block(x)
            return x.square().mean()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.step(batch)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self.step(batch))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]

    torch.manual_seed(seed)
    return Module()


def fit(
    root: str, world_size: int, layout: str, case: Case, folder: Path, stop: int | str = ""
) -> tuple[list[Any], list[int], list[Any], list[Any]]:
    """Train, or go on from the checkpoint of a ``stop``; save where the case says: later stops are of runs that were resumed.

    Returns:
        The samples and the loss of each batch, the epochs that began, what was logged, and the weights of this rank.
    """
    pl: Any = LIGHTNING[root]
    seen: list[Any] = []
    epochs: list[int] = []

    class Watch(pl.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            random.random(), np.random.rand(), torch.rand(1)  # what a callback draws when a run begins

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            parts = batch if isinstance(batch, list) else [batch]
            seen.append((trainer.current_epoch, batch_idx, [part.tolist() for part in parts], outputs["loss"].item()))
            self.save(trainer)

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            self.save(trainer, "v")

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            epochs.append(trainer.current_epoch)
            self.save(trainer, "s")

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            self.save(trainer, "b")

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.save(trainer, "e")

        def save(self, trainer: Any, hook: str = "") -> None:
            now = f"{hook}{trainer.fit_loop.epoch_loop.batch_progress.total.processed}"
            if now in map(str, case.stops) and now != str(stop) and not trainer.sanity_checking:
                trainer.save_checkpoint(folder / f"{now}.ckpt")

    strategy = eval(
        "Strategy(layout, print_plan=False, monitor=False)", {"pl": pl, "Strategy": HybridParallelStrategy, "layout": layout}
    )
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    logged: list[Any] = []

    class Steps(pl.loggers.logger.DummyLogger):  # type: ignore[misc]
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            logged.append((step, metrics.get("loss", "of a validation")))

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        callbacks=[Watch()],
        logger=Steps(),
        log_every_n_steps=1,
        **{"max_epochs": 3, **case.options},
        **quiet,
    )
    seed = 1000 if stop else 0
    random.seed(seed), np.random.seed(seed)
    module = user_module(root, case.loaders, seed)
    trainer.fit(module, None, case.validation(), ckpt_path=str(folder / f"{stop}.ckpt") if stop else None)
    return seen, epochs, logged, [parameter.detach().tolist() for parameter in module.parameters()]


def resume_cases(rank: int, world_size: int, root: str, layout: str, names: list[str], folder: Path) -> None:
    logging.getLogger(root).setLevel(logging.ERROR)
    for name in names:
        case = CASES[name]
        whole, _, steps, weights = fit(root, world_size, layout, case, folder / name)
        stops = {stop: int(str(stop).strip("vesb")) for stop in case.stops}
        stops = {stop: used for stop, used in stops.items() if used < len(whole)}
        assert len(stops) > 1
        for stop, used in stops.items():
            seen, epochs, logged, resumed = fit(root, world_size, layout, case, folder / name, stop)
            first = len(whole) - len(seen)
            assert 0 <= used - first < case.options.get("accumulate_grad_batches", 1)  # again what had not stepped
            for index, (got, expected) in enumerate(zip(seen, whole[first:], strict=True)):
                assert got == expected, f"{name}, stopped after {stop}, batch {index}: {got} is not {expected}"
            assert resumed == weights, f"{name}, stopped after {stop}"
            assert logged == steps[len(steps) - len(logged) :], f"{name}, stopped after {stop}"
            began = str(stop).startswith("b")  # then so did the epoch
            assert epochs == [epoch for epoch, batch_idx, *_ in whole[used + began :] if batch_idx == 0], f"{name}, {stop}"


FEW, MORE = ["workers, accumulated", "two loaders"], ["shuffled", "workers", "stream"]


@pytest.mark.parametrize(
    ("layout", "world_size", "names"),
    [
        ("dp2", 2, FEW + MORE),
        ("dp2_zero1", 2, FEW + MORE),
        ("tp2_pp2", 4, FEW),
        pytest.param("tp2_pp2", 4, MORE, marks=pytest.mark.slow),  # its ranks are one replica, which reads as one process does
    ],
    ids=["dp2", "dp2_zero1", "tp2_pp2", "tp2_pp2, more"],
)
def test_layouts(layout: str, world_size: int, names: list[str], tmp_path: Path) -> None:
    run_ranks(resume_cases, world_size, ROOTS[0], layout, names, tmp_path, timeout=300, have_workers=True)


def test_the_other_namespace(tmp_path: Path) -> None:
    run_ranks(resume_cases, 1, ROOTS[1], "single", ["workers, accumulated", "validation"], tmp_path, have_workers=True)


@pytest.mark.parametrize("name", CASES)
def test_one_process(name: str, tmp_path: Path) -> None:
    run_ranks(resume_cases, 1, ROOTS[0], "single", [name], tmp_path, timeout=200, have_workers=True)
