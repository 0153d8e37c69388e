"""Next-token training of any network that maps tokens to logits, as a plain LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class LanguageModel(pl.LightningModule):
    """Cross-entropy of the next token, linear warm-up and cosine decay over the trainer's steps.

    Args:
        network: maps tokens [B, T] to logits [B, T, vocab_size].
        lr: peak learning rate.
        warmup_steps: optimizer steps to reach it; the decay ends at a tenth of it.
        weight_decay: of matrices; norms have none.
        optimizer: makes it from parameter groups and ``lr``, as a class of ``torch.optim`` does; by default AdamW.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 3e-3,
        warmup_steps: int = 50,
        weight_decay: float = 0.1,
        optimizer: Callable[..., Optimizer] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer = optimizer or partial(torch.optim.AdamW, betas=(0.9, 0.95))
        self.lr, self.warmup_steps, self.weight_decay = lr, warmup_steps, weight_decay

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), prog_bar=True)

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Logits [B, vocab_size] of the token after the last."""
        return self.network(batch["tokens"])[:, -1]

    def configure_optimizers(self) -> dict[str, Any]:
        groups = [
            {"params": [p for p in self.parameters() if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = self.make_optimizer(groups, lr=self.lr)
        num_steps = self.trainer.estimated_stepping_batches
        scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, self.warmup_steps, num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean nats per token of ``targets`` [B, T] given ``tokens`` [B, T]."""
        logits = self.network(batch["tokens"])
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), batch["targets"].view(-1))


def warmup_cosine(step: int, warmup_steps: int, num_steps: float) -> float:
    """Factor on the learning rate: up to 1 in ``warmup_steps``, then half a cosine down to 0.1 at ``num_steps``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decayed = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * decayed))
