"""The run whose ranks `benchmarks.faults` kills: a small model that saves often, and says where it is.

    python benchmarks/survivor.py FOLDER LAYOUT MAX_RESTARTS [CKPT_PATH]

Every rank writes FOLDER/ranks/START-RANK, its process id, and keeps FOLDER/ranks/START-RANK.doing at what it is doing, with the
number of steps that it has begun. What the run has learned in the end is FOLDER/end.ckpt.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_par import HybridParallelStrategy
from lightning_par.host.launch.record import this_attempt
from lightning_par.layout import parse_layout

NUM_STEPS, STEPS_PER_SAVE, BATCHES = 60, 3, 10
STEPPING = "stepping"


class Doing:
    """What this rank is doing, in a file that others read.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ["starting"]
        self._num_steps = 0
        self._write()

    @contextmanager
    def now(self, words: str) -> Iterator[None]:
        """Say that it is doing this, and then what it did before."""
        self._stack.append(words)
        self._write()
        try:
            yield
        finally:
            self._stack.pop()
            self._write()

    def wrap(self, owner: Any, name: str, words: str) -> None:
        """Say so whenever a method of ``owner`` runs."""
        method: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._num_steps += words == STEPPING
            with self.now(words):
                return method(*args, **kwargs)

        setattr(owner, name, wrapped)

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        part.write_text(f"{self._stack[-1]} {self._num_steps}")
        part.rename(self._path)


class Block(nn.Module):
    """A residual block that tp can split."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(32, 64), nn.Linear(64, 32), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(torch.relu(self.up(x))))


class Model(pl.LightningModule):
    """A chain of blocks, with dropout and Adam: the random state and the moments must survive too."""

    def __init__(self, doing: Doing) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.doing = doing

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.blocks(x), y)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.blocks(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    """Train."""
    folder, layout, max_restarts = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    attempt = this_attempt()
    start = 0 if attempt is None else attempt.restart
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", -1)))  # -1: the supervisor
    ranks = folder / "ranks"
    ranks.mkdir(parents=True, exist_ok=True)
    doing = Doing(ranks / f"{start}-{rank}.doing")
    (ranks / f"{start}-{rank}.part").write_text(str(os.getpid()))
    (ranks / f"{start}-{rank}.part").rename(ranks / f"{start}-{rank}")
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    pl.seed_everything(1)
    x = torch.randn(8 * BATCHES, 32)
    loader = DataLoader(TensorDataset(x, x.flip(0)), batch_size=8, shuffle=True)
    strategy = HybridParallelStrategy(layout, print_plan=False, max_restarts=max_restarts)
    doing.wrap(strategy, "save_checkpoint", "saving")
    doing.wrap(strategy, "load_checkpoint", "loading")
    doing.wrap(strategy, "load_model_state_dict", "loading")
    doing.wrap(strategy, "training_step", STEPPING)
    doing.wrap(strategy, "validation_step", "validating")
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=parse_layout(layout).model_size,
        max_steps=NUM_STEPS,
        logger=False,
        callbacks=[
            ModelCheckpoint(
                folder, "{step}", every_n_train_steps=STEPS_PER_SAVE, save_top_k=2, monitor="step", mode="max", save_last=True
            )
        ],
        default_root_dir=folder,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    doing.wrap(trainer.fit_loop, "run", "between steps")
    trainer.fit(
        Model(doing), loader, DataLoader(TensorDataset(x[:16], x[:16]), batch_size=8), ckpt_path=next(iter(sys.argv[4:]), None)
    )
    trainer.save_checkpoint(folder / "end.ckpt")


if __name__ == "__main__":
    main()
