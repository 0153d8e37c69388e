"""The ways to train that are timed from end to end: loader, hooks and optimizer included, the same model on the same data.

Every step trains on the same rows, whoever has which of them: `ROWS` of one process, or half as many of each of two replicas.
A run is a fresh ``fit``, or a fresh loop: a Trainer's steps cannot be made one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from benchmarks.contest import OURS, Run, System, Taken, mean_loss
from benchmarks.replicas import LENGTH, VOCABULARY, Trainee
from benchmarks.stepping import MakeOptimizer, whole
from benchmarks.turns import Lap
from lightning_par import HybridParallelStrategy

NUM_RANKS = 2
ROWS = 8
LOOP, LIGHTNING = "torch, own loop", "Lightning"
ALONE, REPLICAS, SHARDED, SPLIT = "single", "dp2", "dp2_zero3", "tp2"
_NUM_WARM = 4  # this package looks closer at the first three batches, and a Trainer has just been set up
# What writes, and a sampler of Lightning's own, which would shuffle the rows.
_OFF = ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary", "use_distributed_sampler")


class Rows(Dataset[torch.Tensor]):
    """Rows ``[LENGTH + 1]`` of tokens, as many as so many steps need, made before they are timed."""

    def __init__(self, num_steps: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(VOCABULARY, (num_steps * ROWS, LENGTH + 1), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tokens[index]


def make_loader(num_steps: int, num_replicas: int = 1, replica: int = 0) -> DataLoader[torch.Tensor]:
    """A replica's batches of so many steps: of the rows in order, one in so many."""
    rows = Rows(num_steps)
    sampler: Any = DistributedSampler(rows, num_replicas, replica, shuffle=False)
    return DataLoader(rows, batch_size=ROWS // num_replicas, sampler=sampler)


class Stopwatch(pl.Callback):
    """Notes of each step what it gave and took: from the end of the last one, with the loader and all hooks in between."""

    def __init__(self) -> None:
        self.taken: list[Taken] = []
        self._lap: Lap | None = None

    def start(self) -> None:
        """Begin the first step. Collective over all ranks."""
        self._lap = Lap()

    def split(self, loss: torch.Tensor) -> None:
        """End a step and begin the next one. Collective over all ranks."""
        assert self._lap is not None, "a stopwatch is started first"
        seconds, cpu_seconds = self._lap.end()
        self.taken.append(Taken(mean_loss(whole(loss)), seconds, cpu_seconds))
        self._lap = Lap()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.split(outputs["loss"])


# ---------------------------------------------------------------------- loops of one's own


def shard_blocks(model: Trainee, mesh: DeviceMesh) -> None:
    """torch's fully_shard (FSDP2), block by block, as its tutorial shows."""
    for block in model.network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def split_layers(model: Trainee, mesh: DeviceMesh) -> None:
    """DTensor's tensor parallelism: every linear layer, the vocabulary, and inputs that several layers read prepared once."""
    styles: dict[str, ParallelStyle] = {
        **dict.fromkeys(("attention.query", "attention.key", "attention.value", "mlp.up"), ColwiseParallel()),
        **dict.fromkeys(("attention.output", "mlp.down"), RowwiseParallel()),
        "attention": PrepareModuleInput(input_layouts=(Replicate(), None), desired_input_layouts=(Replicate(), None)),
    }
    plan = {
        **{f"network.blocks.*.{name}": style for name, style in styles.items()},
        "network.embedding": RowwiseParallel(input_layouts=Replicate()),
        "network.head": ColwiseParallel(use_local_output=False),  # for `loss_parallel`
    }
    parallelize_module(model, mesh, plan)


def install_loop(rank: int, make_optimizer: MakeOptimizer, work: str) -> Run:
    """A loop as anyone writes it over a DataLoader, with what torch has for the work."""
    num_replicas = 1 if work in (ALONE, SPLIT) else NUM_RANKS

    def run(num_steps: int) -> list[Taken]:
        model: Any = Trainee()
        if work == REPLICAS:
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        elif work != ALONE:
            {SHARDED: shard_blocks, SPLIT: split_layers}[work](model, init_device_mesh("cpu", (NUM_RANKS,)))
        loader = make_loader(num_steps, num_replicas, rank % num_replicas)
        return _loop(model, make_optimizer(model.parameters()), loader, work == SPLIT)

    return run


def _loop(model: nn.Module, optimizer: Optimizer, loader: DataLoader[torch.Tensor], has_parts: bool) -> list[Taken]:
    watch = Stopwatch()
    watch.start()
    for tokens in loader:
        with loss_parallel() if has_parts else nullcontext():
            loss = model(tokens)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.split(loss)
    return watch.taken


# ---------------------------------------------------------------------- Trainers


class Lesson(pl.LightningModule):
    """The same model under a Trainer."""

    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.model, self.make_optimizer = Trainee(), make_optimizer

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(batch)
        return loss

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


class ShardedLesson(Lesson):
    """What Lightning's ModelParallelStrategy asks for: the sharding by FSDP2 is the module's to do."""

    def configure_model(self) -> None:
        shard_blocks(self.model, self.device_mesh["data_parallel"])


class SplitLesson(Lesson):
    """The same for tensor parallelism, as Lightning's guide shows."""

    def configure_model(self) -> None:
        split_layers(self.model, self.device_mesh["tensor_parallel"])

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        with loss_parallel():
            return super().training_step(batch, batch_idx)

    def backward(self, *args: Any, **kwargs: Any) -> None:
        with loss_parallel():
            super().backward(*args, **kwargs)


def install_trainer(
    rank: int,
    make_optimizer: MakeOptimizer,
    make_strategy: Callable[[], Any],
    lesson: type[Lesson] = Lesson,
    num_ranks: int = NUM_RANKS,
    num_replicas: int = 1,
) -> Run:
    """A Trainer of Lightning without logger, checkpoints and progress bar.

    Args:
        rank: of this process.
        make_optimizer: makes it.
        make_strategy: makes the strategy.
        lesson: the module.
        num_ranks: that train.
        num_replicas: of the model.
    """

    def run(num_steps: int) -> list[Taken]:
        watch = Stopwatch()
        options: dict[str, Any] = {"accelerator": "cpu", "devices": num_ranks, "max_steps": num_steps, **dict.fromkeys(_OFF, False)}
        trainer = pl.Trainer(strategy=make_strategy(), callbacks=[watch], **options)
        trainer.fit(lesson(make_optimizer), make_loader(num_steps, num_replicas, rank % num_replicas))
        return watch.taken

    return run


def _ours(word: str, num_ranks: int = NUM_RANKS, num_replicas: int = 1) -> System:
    make = partial(HybridParallelStrategy, word, print_plan=False)
    return _trained(OURS, word, make_strategy=make, num_ranks=num_ranks, num_replicas=num_replicas)


def _trained(name: str, work: str, **options: Any) -> System:
    return System(name, work, partial(install_trainer, **options), _NUM_WARM)


def _written(work: str) -> System:
    return System(LOOP, work, partial(install_loop, work=work), _NUM_WARM)


def train_alone(make_optimizer: MakeOptimizer, num_steps: int) -> list[float]:
    """The loss in each step of one process, without a Trainer or a stopwatch."""
    model, losses = Trainee(), []
    optimizer = make_optimizer(model.parameters())
    for tokens in make_loader(num_steps):
        optimizer.zero_grad()
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


# By the number of ranks.
SYSTEMS = {
    1: (
        _written(ALONE),
        _trained(LIGHTNING, ALONE, make_strategy=lambda: "auto", num_ranks=1),
        _ours(ALONE, 1),
    ),
    NUM_RANKS: (
        _written(REPLICAS),
        _trained(LIGHTNING, REPLICAS, make_strategy=partial(DDPStrategy, gradient_as_bucket_view=True), num_replicas=NUM_RANKS),
        _written(SHARDED),
        _trained(
            LIGHTNING,
            SHARDED,
            make_strategy=partial(ModelParallelStrategy, NUM_RANKS, 1),
            lesson=ShardedLesson,
            num_replicas=NUM_RANKS,
        ),
        _written(SPLIT),
        _trained(LIGHTNING, SPLIT, make_strategy=partial(ModelParallelStrategy, 1, NUM_RANKS), lesson=SplitLesson),
        *(_ours(word, num_replicas=NUM_RANKS) for word in (REPLICAS, "dp2_zero1", "dp2_zero2", SHARDED)),
        *(_ours(word) for word in (SPLIT, "pp2")),
    ),
}
