"""The script that tests/test_failure.py starts: three pipeline stages under the Trainer, of which one fails as the case says.

    python tests/launched_pipeline.py FOLDER CASE PHASE STAGE [HANG_SECONDS]

CASE is what happens in the third step on the pipeline rank STAGE: raise, sleep, hold (the interpreter's lock, in C), kill, stop.
PHASE is where: forward, backward or step (of the optimizer). Each rank writes FOLDER/<rank>: its process id.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_par import HybridParallelStrategy

FOLDER, CASE, PHASE, STAGE = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
HANG_SECONDS = float(sys.argv[5]) if sys.argv[5:] else 20.0
RANK = int(os.environ.get("LOCAL_RANK", 0))
NUM_STAGES, FAILING_STEP = 3, 2


def fail() -> None:
    """What goes wrong, with the time at which it did."""
    (FOLDER / "failed").write_text(str(time.time()))
    if CASE == "raise":
        raise RuntimeError("raised on purpose")
    if CASE == "sleep":
        time.sleep(600)  # the hung line
    if CASE == "hold":
        re.match("(a?){64}a{64}$", "a" * 63 + "b")  # the hung line: no other thread gets the interpreter
    if CASE in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if CASE == "kill" else signal.SIGSTOP)
        time.sleep(600)  # whatever thread meets the signal that ends a process that was stopped, this one is still here


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).tanh()


class Model(pl.LightningModule):
    """A chain whose block of the failing stage fails in the failing step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(NUM_STAGES)))

    def on_train_start(self) -> None:
        (FOLDER / f"{RANK}.part").write_text(str(os.getpid()))
        (FOLDER / f"{RANK}.part").rename(FOLDER / str(RANK))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == FAILING_STEP and RANK == STAGE and PHASE != "step":
            if PHASE == "forward":
                self.blocks[STAGE].linear.register_forward_pre_hook(lambda *_: fail())
            else:
                self.blocks[STAGE].linear.register_full_backward_hook(lambda *_: fail())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_step == FAILING_STEP and RANK == STAGE and PHASE == "step":
            fail()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.blocks(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.manual_seed(0)
    trainer = pl.Trainer(
        strategy=HybridParallelStrategy("pp3_mb4", print_plan=False, hang_seconds=HANG_SECONDS),
        accelerator="cpu",
        devices=NUM_STAGES,
        max_steps=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), DataLoader(torch.randn(64, 8), batch_size=8))


if __name__ == "__main__":
    main()
