"""Training in one process in a given precision, written with plain torch: what runs in a layout are held against.

It takes the same microbatches as the layout and adds up in float32, so that what differs is the order of sums and, over tp, where
a product is rounded.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_par.layout import Layout
from tests.models import ByteModel
from tests.parity import CLIP, REPLICA_BATCH, STEPS, MakeModel, Run, Steps

Plant = Callable[[int, nn.Module], None]  # changes the gradients of a step


class FrozenBlock(ByteModel):
    """The GPT of the main job with one frozen block."""

    def __init__(self) -> None:
        super().__init__()
        self.network.blocks[1].requires_grad_(False)


def frozen_block() -> pl.LightningModule:
    return FrozenBlock()


@contextmanager
def _default(dtype: torch.dtype) -> Any:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _context(precision: str) -> AbstractContextManager[Any]:
    if precision == "bf16-true":
        return _default(torch.bfloat16)
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return torch.autocast("cpu", dtypes[precision], cache_enabled=False) if precision in dtypes else nullcontext()


def train_plainly(
    make: MakeModel,
    layout: Layout,
    precision: str,
    steps: int = STEPS,
    scaler: torch.amp.GradScaler | None = None,
    plant: Plant = lambda step, module: None,
) -> Run:
    """Train on the batches of all replicas; float32 masters are stepped, with float32 gradients.

    Args:
        make: makes the module.
        layout: whose microbatches are taken, which must be in it.
        precision: one of Lightning's words.
        steps: so many.
        scaler: torch's own, for 16-mixed.
        plant: called before each step, with what has the summed gradients.
    """
    assert layout.microbatches is not None and layout.dp is not None
    torch.manual_seed(0)
    module, run, num_parts = make(), Run(), layout.microbatches * layout.dp
    if precision == "bf16-true":
        module.bfloat16()
    masters = copy.deepcopy(module).float()
    optimizer: Any = masters.configure_optimizers()
    data = Steps(layout.dp)
    for step in range(steps):
        batch, total = data.make(step, REPLICA_BATCH * layout.dp), 0.0
        for part in range(num_parts):
            rows = slice(part * REPLICA_BATCH // layout.microbatches, (part + 1) * REPLICA_BATCH // layout.microbatches)
            with _context(precision), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # self.log without a Trainer
                loss = module.training_step({name: tensor[rows] for name, tensor in batch.items()}, step)
            total += float(loss.detach().double()) / num_parts
            weighted = loss * (1 / num_parts)
            (weighted if scaler is None else scaler.scale(weighted)).backward()
            _add_gradients(module, masters)
        if step == 0:
            run.gradients = {name: p.grad.clone() for name, p in masters.named_parameters() if p.grad is not None}
        plant(step, masters)
        if scaler is not None:
            scaler.unscale_(optimizer)
        run.norms.append(float(nn.utils.clip_grad_norm_([p for p in masters.parameters() if p.requires_grad], CLIP)))
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        run.losses.append(total)
        with torch.no_grad():
            for ours, master in zip(module.parameters(), masters.parameters(), strict=True):
                ours.copy_(master)
    run.weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return run


def _add_gradients(module: nn.Module, masters: nn.Module) -> None:
    """Move the gradients of one microbatch to the float32 sums."""
    for ours, master in zip(module.parameters(), masters.parameters(), strict=True):
        if ours.grad is not None:
            gradient, ours.grad = ours.grad.float(), None
            master.grad = gradient if master.grad is None else master.grad + gradient
