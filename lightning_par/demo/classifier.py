"""Classification by any model of transformers that gives logits, of texts or of images, as a plain LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_par.demo.optimizer import optimizer_and_schedule


class Classifier(pl.LightningModule):
    """Cross-entropy of the right class, and the fraction of samples whose class is found.

    Batches are ``labels`` [B] and what ``network`` takes by name: ``input_ids`` and ``attention_mask``, or ``pixel_values``.

    Args:
        network: gives an object with ``logits`` [B, num_classes].
        lr: peak learning rate.
        warmup_steps: optimizer steps to reach it; the decay ends at a tenth of it.
        weight_decay: of matrices; norms and biases have none.
        optimizer: makes it from parameter groups and ``lr``, as a class of ``torch.optim`` does; by default AdamW.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 1e-3,
        warmup_steps: int = 50,
        weight_decay: float = 0.1,
        optimizer: Callable[..., Optimizer] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer = optimizer or torch.optim.AdamW
        self.lr, self.warmup_steps, self.weight_decay = lr, warmup_steps, weight_decay

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss, accuracy = self._judge(batch)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", accuracy)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        loss, accuracy = self._judge(batch)
        self.log("val_loss", loss, prog_bar=True)
        self.log("val_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizer_and_schedule(self, self.make_optimizer, self.lr, self.warmup_steps, self.weight_decay)

    def _judge(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean nats per sample, in float32 whatever the logits are in, and the fraction that is right."""
        labels = batch["labels"]
        logits = self.network(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
        return F.cross_entropy(logits, labels), (logits.argmax(dim=-1) == labels).float().mean()
