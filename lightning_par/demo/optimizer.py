"""An optimizer with decay of matrices alone, and a learning rate that warms up and decays over the trainer's steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def optimizer_and_schedule(
    module: pl.LightningModule, make: Callable[..., Optimizer], lr: float, warmup_steps: int, weight_decay: float
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns.

    Args:
        module: attached to a trainer, whose steps the schedule ends with.
        make: makes the optimizer from parameter groups and ``lr``, as a class of ``torch.optim`` does.
        lr: peak learning rate.
        warmup_steps: optimizer steps to reach it; the decay ends at a tenth of it.
        weight_decay: of matrices; norms and biases have none.
    """
    groups = [
        {"params": [p for p in module.parameters() if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in module.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = make(groups, lr=lr)
    num_steps = module.trainer.estimated_stepping_batches
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps, num_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def warmup_cosine(step: int, warmup_steps: int, num_steps: float) -> float:
    """Factor on the learning rate: up to 1 in ``warmup_steps``, then half a cosine down to 0.1 at ``num_steps``."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decayed = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * decayed))
