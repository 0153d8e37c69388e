"""Saves and loads of one run's model states, timed in turns.

lightning_par    a checkpoint of two replicas under zero1, as the Trainer writes and resumes it
in background    the same with ``async_save``: how long the step waits
raw              each rank writes as many bytes as it wrote above into one file and syncs it; reads them into memory
DCP              each rank's pieces of the same tensors by torch.distributed.checkpoint, files synced
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.utils.data import DataLoader

from benchmarks.command import report
from lightning_par import HybridParallelStrategy
from lightning_par.checkpoint import Checkpoint
from lightning_par.checkpoint.shard_file import bytes_of
from lightning_par.demo.gpt import GPT
from lightning_par.host.checkpoints import RunCheckpoints

NUM_RANKS, WORD = 2, "tp2"
OURS, BACKGROUND, RAW, DCP = "lightning_par", "in background", "raw", "DCP"
SYSTEMS = (OURS, BACKGROUND, RAW, DCP)


@dataclass(frozen=True)
class Effort:
    """How large and how often.

    Attributes:
        width, depth: of the model.
        repeats: of each system, there and back.
    """

    width: int = 1024
    depth: int = 8
    repeats: int = 3


QUICK = Effort(128, 2, 1)


@dataclass
class Row:
    """One system.

    Attributes:
        system: its name.
        state_bytes: of the model states of all ranks, without replicas.
        written_bytes: of them, on the disk.
        save_seconds, load_seconds: of the slowest rank, each time.
        wrong: what is not as it should be; empty where nothing is.
    """

    system: str
    state_bytes: int = 0
    written_bytes: int = 0
    save_seconds: list[float] = field(default_factory=list)
    load_seconds: list[float] = field(default_factory=list)
    wrong: str = ""


class Trainee(pl.LightningModule):
    """A GPT after one step of AdamW."""

    def __init__(self, effort: Effort) -> None:
        super().__init__()
        self.network = GPT(vocab_size=256, width=effort.width, depth=effort.depth, heads=4)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def measure_rank(rank: int, world_size: int, effort: Effort, folder: Path) -> list[Row]:
    """Time every system. Collective over the world; rank 0 has the slowest rank's times."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    trainer = _train(effort)
    strategy: Any = trainer.strategy
    background = RunCheckpoints(strategy.engine, is_async=True)
    share = [values.contiguous() for _, _, _, values in strategy.engine.share().pieces]
    systems: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any] | None]] = {
        OURS: (trainer.save_checkpoint, lambda path: _resume(strategy.checkpoints, path)),
        BACKGROUND: (lambda path: background.save(path, trainer._checkpoint_connector.dump_checkpoint()), None),
        RAW: (lambda path: _write_raw(path, rank, share), lambda path: _read_raw(path, rank, share)),
        DCP: (lambda path: _save_dcp(path, rank, share), lambda path: _load_dcp(path, rank, share)),
    }
    rows = {name: Row(name, _count(strategy)) for name in SYSTEMS}
    for turn in range(2 * effort.repeats + 1):
        for name in SYSTEMS if turn % 2 else reversed(SYSTEMS):
            save, load = systems[name]
            path = folder / name.replace(" ", "_")
            took = [_timed(partial(save, path))]
            background.wait()
            if load is not None:
                took.append(_timed(partial(load, path)))
            if turn:  # the first one makes files and memory
                rows[name].save_seconds.append(took[0])
                rows[name].load_seconds += took[1:]
            elif rank == 0 and name in (OURS, BACKGROUND):
                rows[name].written_bytes, rows[name].wrong = _check(path, rows[name].state_bytes)
            dist.barrier()
            if rank == 0:
                shutil.rmtree(path)
                report(f"turn {turn} of {2 * effort.repeats}: {name} {' and '.join(f'{each:.2f} s' for each in took)}")
            dist.barrier()
    return list(rows.values())


def _train(effort: Effort) -> pl.Trainer:
    torch.manual_seed(0)
    strategy = HybridParallelStrategy(WORD, print_plan=False)
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", devices=NUM_RANKS, strategy=strategy, max_epochs=1, **quiet)
    tokens: Any = torch.randint(0, 256, (2, 8))
    trainer.fit(Trainee(effort), DataLoader(tokens, batch_size=2))
    return trainer


def _count(strategy: Any) -> int:
    """Bytes of the weight and the two moments of every element of the model."""
    return 3 * 4 * sum(math.prod(parameter.spec.shape) for parameter in strategy.plan.parameters)


def _check(path: Path, state_bytes: int) -> tuple[int, str]:
    """Bytes of the pieces in a checkpoint, and what is wrong with them."""
    checkpoint = Checkpoint(path)
    written = sum(
        piece.box.numel * getattr(torch, values.dtype).itemsize
        for entry in checkpoint.index.entries.values()
        for values in entry.values.values()
        for piece in values.pieces
    )
    for name, entry in checkpoint.index.entries.items():
        for what in entry.values:
            checkpoint.read_whole(name, what)  # checks every piece
    return written, "" if written == state_bytes else f"{written:,} bytes were written of a state of {state_bytes:,}"


def _timed(action: Callable[[], Any]) -> float:
    """Seconds of the slowest rank. Collective over the world."""
    dist.barrier()
    start = time.perf_counter()
    action()
    took = torch.tensor([time.perf_counter() - start])
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def _resume(checkpoints: RunCheckpoints, path: Path) -> None:
    checkpoints.open(path, trust=False)
    checkpoints.restore(is_strict=True)


def _write_raw(path: Path, rank: int, share: list[Tensor]) -> None:
    path.mkdir(exist_ok=True)
    with open(path / str(rank), "wb", buffering=0) as file:
        for tensor in share:
            file.write(bytes_of(tensor))
        os.fsync(file.fileno())


def _read_raw(path: Path, rank: int, share: list[Tensor]) -> None:
    new = [torch.empty_like(tensor) for tensor in share]
    with open(path / str(rank), "rb", buffering=0) as file:
        for tensor in new:
            file.readinto(bytes_of(tensor))


def _save_dcp(path: Path, rank: int, share: list[Tensor]) -> None:
    writer = filesystem.FileSystemWriter(path, single_file_per_rank=True, sync_files=True)
    state_dict_saver.save({f"{rank}/{index}": tensor for index, tensor in enumerate(share)}, storage_writer=writer)


def _load_dcp(path: Path, rank: int, share: list[Tensor]) -> None:
    reader = filesystem.FileSystemReader(path)
    state_dict_loader.load({f"{rank}/{index}": tensor for index, tensor in enumerate(share)}, storage_reader=reader)


def differences(rows: list[Row]) -> list[str]:
    """What is wrong, in words."""
    return [f"{row.system}: {row.wrong}" for row in rows if row.wrong]
