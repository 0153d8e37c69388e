"""What a stage received, in the place of what its own code made of placeholders.

[Note: in the place of] A tensor that crosses stages may have any readers: later blocks, code between them, code after them.
So the very tensor object that the user's code holds is made to be the tensor that was received, and every reader sees it.
For that, code before a later stage's first block runs without gradients: what it makes are leaves, and their ``grad`` is what
the stage before is sent. Only what is made between the last block that is passed over and the stage's first one has a graph
(reentrant checkpointing asks for a hidden state that requires a gradient). It is cut off there; where it cannot be, because the
tensor is a view or is in the hands of reentrant checkpointing already, a hook takes the gradient and passes zeros on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Arrival:
    """What a stage received for one microbatch.

    Attributes:
        tensors: the user's tensors, the hidden state first; empty until they have arrived.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._returns: list[bool] = []
        self._grads: dict[int, torch.Tensor] = {}

    def put(self, held: Sequence[torch.Tensor], received: Sequence[torch.Tensor], returns: Sequence[bool]) -> None:
        """Make each of ``held`` the one of ``received``; see [Note: in the place of].

        Args:
            held: the user's tensors.
            received: what takes their place.
            returns: whether the stage before is sent a gradient of each.
        """
        self.tensors, self._returns = list(held), list(returns)
        for index, (mine, theirs) in enumerate(zip(held, received, strict=True)):
            zeros = mine.new_zeros(()).expand(mine.shape)
            if mine.grad_fn is not None and torch.is_grad_enabled() and mine._base is None:
                mine.detach_()
            mine.data = theirs
            if returns[index] and mine.grad_fn is None:
                mine.requires_grad_()
            elif mine.grad_fn is not None:
                mine.register_hook(self._taking(index, zeros))

    def gradients(self) -> list[torch.Tensor]:
        """What the backward gave each tensor that returns a gradient; zeros where it gave nothing."""
        return [self._gradient(index, tensor) for index, tensor in enumerate(self.tensors) if self._returns[index]]

    def _gradient(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        found = self._grads.get(index) if tensor.grad_fn is not None else tensor.grad
        return torch.zeros_like(tensor) if found is None else found

    def _taking(self, index: int, zeros: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def take(grad: torch.Tensor) -> torch.Tensor:
            self._grads[index] = self._grads[index] + grad if index in self._grads else grad
            return zeros

        return take
