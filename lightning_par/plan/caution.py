"""What a layout changes about a step without being wrong in itself: notes of the plan, for the user to judge."""

from __future__ import annotations

from typing import Any

import torch

from lightning_par.layout import Layout
from lightning_par.runtime.nested import at_path, paths_in
from lightning_par.trace import Op, Trace

IGNORED = -100  # torch's and transformers' default ignore_index
_LOSSES = ("cross_entropy", "nll_loss")


def cautions(trace: Trace, layout: Layout, batch: Any, counts_targets: bool = False) -> tuple[str, ...]:
    """Notes on losses and norms that are no plain mean over samples, where a batch is cut into parts.

    Args:
        trace: a dry run of the step.
        layout: with its number of microbatches resolved.
        batch: the batch of the dry run, with its values.
        counts_targets: whether the parts count by their targets.
    """
    parts = (layout.microbatches or 1) * (layout.dp or 1)
    if parts == 1:
        return ()
    notes = [note for op in trace.ops if (note := _on_loss(op, parts)) is not None and not counts_targets]
    for op in trace.ops:
        if op.name in _LOSSES and not counts_targets and (note := _on_ignored(trace, op, batch, parts)) is not None:
            notes.append(note)
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


def _on_ignored(trace: Trace, op: Op, batch: Any, parts: int) -> str | None:
    """The line that counts a loss's targets, where the batch has some that it ignores."""
    ignored = op.argument(4, "ignore_index", IGNORED)
    root, shift = _origin(trace, op.inputs[1]) if len(op.inputs) > 1 else ((), 0)
    found = [path for path in paths_in(batch) if _has(at_path(batch, path)[0], ignored)]
    like = [path for path in found if tuple(at_path(batch, path)[0].shape) == root]
    if not (like or (found and ignored == IGNORED)):
        return None
    line, options = (like or found)[0], [f"ignore_index: {ignored}"] * (ignored != IGNORED) + [f"shift: {shift}"] * bool(shift)
    line = f"{{field: {line}, {', '.join(options)}}}" if options else line
    return (
        f"the batch has ignored targets ({ignored}): each of its {parts} parts counts by its samples, however many targets it "
        f"has; one process counts every target alike, and so does loss_weight={line}"
    )


def _origin(trace: Trace, number: int) -> tuple[tuple[int, ...], int]:
    """The shape of the tensor that a loss's targets were made from, and how many elements at its start were left out."""
    makers = {output: op for op in trace.ops for output in op.outputs}
    shift = 0
    while number in makers and makers[number].inputs:
        op = makers[number]
        if op.name == "__getitem__":
            index = op.arguments[-1]
            last = index[-1] if isinstance(index, tuple) and index else None
            shift += last.start or 0 if isinstance(last, slice) and isinstance(last.start, (int, type(None))) else 0
        number = op.inputs[0]
    return trace.values[number].shape, shift


def _has(tensor: torch.Tensor, value: int) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) and bool((tensor == value).any())
