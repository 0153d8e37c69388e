"""The loss in what a training_step returns, and one that counts for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_par.errors import ModelError
from lightning_par.host.loss import give_no_gradient, loss_of


@pytest.mark.parametrize("output", [torch.tensor(2.0), torch.full((1,), 2.0), {"loss": torch.tensor(2.0), "logits": None}])
def test_the_loss_is_found(output: Any) -> None:
    assert float(loss_of(output)) == 2.0


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, r"training_step returned None for a batch: .* return the loss tensor"),
        ({"logits": torch.zeros(2)}, r"training_step returned None for a batch"),
        (1.5, r"training_step returned float for a batch"),
        (torch.zeros(8), r"training_step returned a loss of shape \(8,\) for a batch, .*: return its mean, loss.mean\(\)"),
    ],
)
def test_what_is_no_loss(output: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        loss_of(output)


def test_an_undefined_loss_gives_zeros_and_leaves_others_alone() -> None:
    weight, hidden = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    empty = ((weight * hidden).exp() * torch.zeros(3)).sum() / torch.zeros(())
    other = (weight * 2).sum()
    give_no_gradient(empty)
    other.backward()
    (empty * 0.0).backward()
    assert weight.grad is not None and weight.grad.tolist() == [2.0] * 3
    assert hidden.grad is not None and hidden.grad.tolist() == [0.0] * 3
