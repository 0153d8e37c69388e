"""What a stage received for one microbatch, and what it gives back for it.

[Note: in the place of] The stage's first block is called with the hidden state that was received. Any other tensor that crosses
may have any readers: later blocks, code between them, code after them. So the very tensor object that the user's code holds is
made to be the one that was received, and every reader sees it. Where blocks are called with gradients, code before a later
stage's first block runs without: what it makes are leaves, and their ``grad`` is what the stage before is sent. A tensor that
has a graph all the same is cut off from it; where it cannot be, because it is a view or in the hands of reentrant
checkpointing already, a hook takes its gradient and passes zeros on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Arrival:
    """What a stage received for one microbatch.

    Attributes:
        hidden: the hidden state, a leaf; None until it has arrived.
    """

    def __init__(self) -> None:
        self.hidden: torch.Tensor | None = None
        self._returning: list[torch.Tensor] = []
        self._grads: dict[int, torch.Tensor] = {}  # of tensors that have a graph, by their place among these

    def put(self, received: Sequence[torch.Tensor], held: Sequence[torch.Tensor], returns: Sequence[bool]) -> None:
        """Take what has arrived; see [Note: in the place of].

        Args:
            received: the hidden state first.
            held: the user's tensors, whose place the others take.
            returns: whether the stage before is sent a gradient, of the hidden state and of each of ``held``.
        """
        hidden, *others = received
        self.hidden = hidden.detach().requires_grad_(returns[0])
        if returns[0]:
            self._returning.append(self.hidden)
        for mine, theirs, has_gradient in zip(held, others, returns[1:], strict=True):
            self._replace(mine, theirs, has_gradient)

    def gradients(self) -> list[torch.Tensor]:
        """What the backward gave each tensor that returns a gradient; zeros where it gave nothing."""
        return [self._gradient(index, tensor) for index, tensor in enumerate(self._returning)]

    def _replace(self, mine: torch.Tensor, theirs: torch.Tensor, has_gradient: bool) -> None:
        zeros = mine.new_zeros(()).expand(mine.shape)
        if mine.grad_fn is not None and torch.is_grad_enabled() and mine._base is None:
            mine.detach_()
        mine.data = theirs
        if has_gradient:
            self._returning.append(mine)
        if mine.grad_fn is not None:
            mine.register_hook(self._taking(len(self._returning) - 1, zeros) if has_gradient else lambda grad: zeros)
        elif has_gradient:
            mine.requires_grad_()

    def _gradient(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        found = self._grads.get(index) if tensor.grad_fn is not None else tensor.grad
        return torch.zeros_like(tensor) if found is None else found

    def _taking(self, index: int, zeros: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def take(grad: torch.Tensor) -> torch.Tensor:
            self._grads[index] = self._grads[index] + grad if index in self._grads else grad
            return zeros

        return take
