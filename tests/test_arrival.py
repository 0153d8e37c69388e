"""What a stage received stands in the place of the user's own tensors, and its gradient is whole."""

from __future__ import annotations

import pytest
import torch

from lightning_par.pipeline.arrival import Arrival


def received() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, generator=generator) for _ in range(2)]


def made(how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor that the user's code made on a stage that does not own its parameter, and that parameter's placeholder."""
    weight = torch.zeros(()).expand(2, 3).requires_grad_()
    if how == "without gradients":
        with torch.no_grad():
            return weight.view(2, 3) + 1, weight
    return (weight + 1 if how == "with a graph" else (weight + 1).view(3, 2).view(2, 3)), weight


@pytest.mark.parametrize("how", ["without gradients", "with a graph", "a view with a graph"])
def test_every_reader_sees_what_was_received_and_gives_its_gradient(how: str) -> None:
    hidden, side = received()
    mine, weight = made(how)
    kept_elsewhere = [mine]
    arrival = Arrival()
    arrival.put([hidden, side], [mine], [True, True])
    assert arrival.hidden is not None and torch.equal(kept_elsewhere[0], side)
    (arrival.hidden * mine).sum().backward()
    (mine * 2).sum().backward()
    of_hidden, of_side = arrival.gradients()
    assert torch.equal(of_hidden, side) and torch.equal(of_side, hidden + 2)
    assert weight.grad is None or not weight.grad.any()  # nothing flows on into what the placeholder made


def test_a_gradient_that_nobody_is_sent_is_not_added_to_another() -> None:
    hidden, side = received()
    (silent, _), (mine, _) = made("a view with a graph"), made("a view with a graph")
    arrival = Arrival()
    arrival.put([hidden, side, side], [silent, mine], [True, False, True])
    (5 * silent + 2 * mine).sum().backward()
    of_hidden, of_mine = arrival.gradients()
    assert torch.equal(of_mine, torch.full((2, 3), 2.0)) and not of_hidden.any()


def test_a_tensor_in_the_hands_of_reentrant_checkpointing_keeps_its_place_in_the_graph() -> None:
    hidden, side = received()
    mine, _ = made("with a graph")
    arrival = Arrival()
    with torch.no_grad():  # the forward inside of it
        arrival.put([hidden, side], [mine], [True, True])
    assert mine.grad_fn is not None
    mine.sum().backward()
    assert torch.equal(arrival.gradients()[1], torch.ones(2, 3))


def test_other_shapes_and_types_take_the_place_of_placeholders() -> None:
    hidden = torch.randn(2, 3)
    whole, counts = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    arrival = Arrival()
    arrival.put([hidden, torch.ones(4, 5), torch.arange(6)], [whole, counts], [True, True, False])
    assert whole.shape == (4, 5) and counts.tolist() == list(range(6)) and not counts.requires_grad
    assert [tuple(gradient.shape) for gradient in arrival.gradients()] == [(2, 3), (4, 5)]  # zeros, where nothing was read


def test_nothing_needs_a_gradient_in_evaluation() -> None:
    hidden, side = received()
    mine, _ = made("without gradients")
    arrival = Arrival()
    arrival.put([hidden, side], [mine], [False, False])
    assert arrival.hidden is not None and not arrival.hidden.requires_grad and not mine.requires_grad
    assert arrival.gradients() == []
