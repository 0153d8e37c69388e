"""The loss in what a training_step returns, and one that counts for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_par.errors import ModelError


def loss_of(output: Any) -> torch.Tensor:
    """The loss in what ``training_step`` returned.

    Raises:
        ModelError: there is none, or it is more than one number.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, torch.Tensor):
        raise ModelError(
            f"training_step returned {'None' if loss is None else type(loss).__name__} for a batch: a parallel run needs the loss "
            "of every batch; return the loss tensor"
        )
    if loss.numel() != 1:
        raise ModelError(
            f"training_step returned a loss of shape {tuple(loss.shape)} for a batch, and the backward starts from one number: "
            "return its mean, loss.mean()"
        )
    return loss


def give_no_gradient(loss: torch.Tensor) -> None:
    """Let the backward of ``loss`` pass zeros on, through its whole graph.

    A mean over no target is undefined, and a gradient of 0 times that is too. The backward itself must run: other stages and
    replicas wait for what it sends.
    """
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node.next_functions and node not in seen:  # the ends are the parameters', for all microbatches
            seen.add(node)
            node.register_prehook(_zeros)
            waiting += [following for following, _ in node.next_functions]


def _zeros(gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if gradient is None else torch.zeros_like(gradient) for gradient in gradients)
