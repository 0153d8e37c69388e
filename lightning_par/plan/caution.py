"""What a layout changes about a step without being wrong in itself: notes of the plan, for the user to judge."""

from __future__ import annotations

from typing import Any

import torch

from lightning_par.layout import Layout
from lightning_par.runtime.nested import tensors_in
from lightning_par.trace import Op, Trace

IGNORED = -100  # torch's and transformers' default ignore_index
_LOSSES = ("cross_entropy", "nll_loss")


def cautions(trace: Trace, layout: Layout, batch: Any) -> tuple[str, ...]:
    """Notes on losses and norms that are no plain mean over samples, where a batch is cut into parts.

    Args:
        trace: a dry run of the step.
        layout: with its number of microbatches resolved.
        batch: the batch of the dry run, with its values.
    """
    parts = (layout.microbatches or 1) * (layout.dp or 1)
    if parts == 1:
        return ()
    notes = [note for op in trace.ops if (note := _on_loss(op, parts)) is not None]
    if any(op.name in _LOSSES for op in trace.ops) and any(_has_ignored(tensor) for tensor in tensors_in(batch)):
        notes.append(
            f"the batch has ignored targets ({IGNORED}): each of its {parts} parts counts by its samples, however many targets it "
            "has; one process counts every target alike"
        )
    if any(op.name == "batch_norm" and ("training", True) in op.arguments for op in trace.ops):
        notes.append(f"BatchNorm takes its statistics from each of {parts} parts of a batch; one process takes them from all")
    return tuple(dict.fromkeys(notes))


def _on_loss(op: Op, parts: int) -> str | None:
    if op.name not in _LOSSES:
        return None
    if op.named.get("reduction") == "sum":
        return (
            f"{op.name} sums over its targets, and the run takes the mean over {parts} parts of a batch: the loss is that of a part"
        )
    if op.named.get("weight") is not None:
        return (
            f"{op.name} weighs its targets by class: each of {parts} parts of a batch counts by its samples, whatever its weights "
            "are; one process divides by the weights of all"
        )
    return None


def _has_ignored(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) and bool((tensor == IGNORED).any())
