"""The script that torchrun starts on both hosts of tests/test_clusters.py: it trains in one order of the axes, and in the reverse.

    torchrun ... tests/launched_hosts.py FILE

The first rank writes to FILE, as JSON, for each order the loss of every step and its seconds.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader, TensorDataset

from lightning_par import HybridParallelStrategy

WIDTH, ROWS, NUM_BLOCKS, NUM_STEPS = 256, 256, 8, 4


class Block(nn.Module):
    """Little to compute for what the tp ranks exchange: the sum of its output, and in the backward that of its input's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(pl.LightningModule):
    """A chain of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(NUM_BLOCKS)))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.blocks(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Steps(pl.Callback):
    """What every step gave and how long it took."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._began_at = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self._began_at = time.monotonic()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.seconds.append(time.monotonic() - self._began_at)


def train() -> dict[str, list[float]]:
    """Train with the ranks as they are numbered."""
    pl.seed_everything(1)
    x = torch.randn(NUM_STEPS * ROWS, WIDTH)
    steps = Steps()
    trainer = pl.Trainer(
        strategy=HybridParallelStrategy("tp2_pp2_mb2", print_plan=False), accelerator="cpu", devices=2, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[steps],
    )  # fmt: skip
    trainer.fit(Model(), DataLoader(TensorDataset(x, x.flip(0)), batch_size=ROWS))
    return {"losses": steps.losses, "seconds": steps.seconds}


def number_round_the_hosts() -> None:
    """Make a group in which tp peers are on different hosts, pipelines inside of one; the strategy takes what group there is."""
    dist.destroy_process_group()
    started = int(os.environ["RANK"])
    store, _, world_size = next(rendezvous("env://", timeout=timedelta(seconds=60)))
    dist.init_process_group("gloo", store=PrefixStore("reverse", store), rank=[0, 2, 1, 3][started], world_size=world_size)


def main() -> None:
    """Train in both orders."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    default = train()
    number_round_the_hosts()
    reverse = train()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps({"default": default, "reverse": reverse}))


if __name__ == "__main__":
    main()
