"""A checkpoint of a real run, for what reads and makes checkpoints outside of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_par.host.strategy import HybridParallelStrategy
from lightning_par.layout import Layout, parse_layout
from tests.models import VOCABULARY, TransformersModel, make_batch
from tests.parity import fit
from tests.ranks import run_ranks

BATCH, EPOCH = 8, 3


class Written(TransformersModel):
    """A small GPT-2, whose head is tied: with hyperparameters, a buffer, two groups of parameters and a schedule."""

    def __init__(self, width: int = 32, lr: float = 1e-2) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=width,
            n_layer=2,
            n_head=2,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        super().__init__(GPT2LMHeadModel(config))
        self.save_hyperparameters()
        self.register_buffer("seen", torch.tensor([3, 4]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def configure_optimizers(self) -> Any:
        decayed = [parameter for parameter in self.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in self.parameters() if parameter.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"], eps=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"tensor": torch.arange(3), "number": float("inf")}


class Batches(Dataset[dict[str, torch.Tensor]]):
    """The same global batches for every layout, of which a replica has its part."""

    def __init__(self, dp_size: int = 1, dp_rank: int = 0) -> None:
        self.size = BATCH // dp_size
        self.start = dp_rank * self.size

    def __len__(self) -> int:
        return EPOCH

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        if step >= EPOCH:
            raise IndexError(step)
        return {key: value[self.start :][: self.size] for key, value in make_batch(step, BATCH).items()}


def loader(dp_size: int = 1, dp_rank: int = 0) -> DataLoader[Any]:
    return DataLoader(Batches(dp_size, dp_rank), batch_size=None)


def train_plain(epochs: int, ckpt_path: str | None = None) -> tuple[pl.Trainer, pl.LightningModule, list[float]]:
    """The run by plain Lightning in one process: its Trainer, module and losses."""
    trainer, module, run = fit(
        Written,
        loader(),
        ckpt_path=ckpt_path,
        accelerator="cpu",
        devices=1,
        max_steps=-1,
        max_epochs=epochs,
        gradient_clip_val=None,
    )
    return trainer, module, run.losses


def write_run(word: str, path: Path, precision: str = "32-true") -> dict[str, torch.Tensor]:
    """Train an epoch in a layout and save.

    Returns:
        The ``state_dict`` of the module at its end, from plain parameters on rank 0 of a layout without tp and pp; else empty.
    """
    layout = parse_layout(word)
    layout = layout.resolve(layout.world_size)
    return run_ranks(_write, layout.world_size, layout, path, precision, timeout=200)[0]  # type: ignore[no-any-return]


def _write(rank: int, world_size: int, layout: Layout, path: Path, precision: str) -> dict[str, torch.Tensor]:
    strategy = HybridParallelStrategy(layout, print_plan=False)
    trainer, module, _ = fit(
        Written,
        loader(layout.dp or 1, layout.coordinate_of(rank).dp),
        strategy=strategy,
        accelerator="cpu",
        devices=layout.world_size,
        max_steps=-1,
        max_epochs=1,
        gradient_clip_val=None,
        precision=precision,
    )
    trainer.save_checkpoint(path)
    alone = layout.world_size == 1
    weights = {name: value.detach().clone() for name, value in module.state_dict().items()} if alone else {}
    strategy.states.close()
    return weights
