"""Next-token training of any network that maps tokens to logits, as a plain LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_par.demo.optimizer import optimizer_and_schedule


class LanguageModel(pl.LightningModule):
    """Cross-entropy of the next token, linear warm-up and cosine decay over the trainer's steps.

    Args:
        network: maps tokens [B, T] to logits [B, T, vocab_size], or to what has them as ``logits``, as models of transformers do.
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
        return self._logits(batch["tokens"])[:, -1]

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizer_and_schedule(self, self.make_optimizer, self.lr, self.warmup_steps, self.weight_decay)

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        output = self.network(tokens)
        logits: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
        return logits

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean nats per token of ``targets`` [B, T] given ``tokens`` [B, T], in float32 whatever the logits are in."""
        logits = self._logits(batch["tokens"])
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), batch["targets"].view(-1))
