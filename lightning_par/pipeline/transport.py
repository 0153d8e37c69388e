"""Point-to-point traffic between neighbouring stages.

Activations and gradients travel on process groups of their own, so that neither direction waits behind the other. A
send returns at once and keeps its tensor alive until it has left; a receive waits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from lightning_par.runtime.axis import GroupAxis


class Transport:
    """Sends and receives of one stage.

    Args:
        forward: the pipeline's ranks in order of the stages, for activations.
        backward: the same ranks on another group, for gradients.
    """

    def __init__(self, forward: GroupAxis, backward: GroupAxis) -> None:
        self._forward, self._backward = forward, backward
        self._leaving: list[tuple[dist.Work, torch.Tensor]] = []
        self.is_first, self.is_last = forward.coordinate == 0, forward.coordinate == forward.size - 1

    def send_activation(self, hidden: torch.Tensor) -> None:
        """Send to the next stage."""
        self._send(hidden, self._forward, +1)

    def send_gradient(self, grad: torch.Tensor) -> None:
        """Send to the stage before."""
        self._send(grad, self._backward, -1)

    def receive_activation(self, like: torch.Tensor) -> torch.Tensor:
        """Receive from the stage before a tensor with the shape and dtype of ``like``. Waits."""
        return self._receive(like, self._forward, -1)

    def receive_gradient(self, like: torch.Tensor) -> torch.Tensor:
        """Receive from the next stage the gradient of ``like``. Waits."""
        return self._receive(like, self._backward, +1)

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for work, _ in self._leaving:
            work.wait()
        self._leaving.clear()

    def _send(self, tensor: torch.Tensor, axis: GroupAxis, step: int) -> None:
        self._leaving = [(work, kept) for work, kept in self._leaving if not work.is_completed()]
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, axis.ranks[axis.coordinate + step], group=axis.group)
        assert work is not None
        self._leaving.append((work, tensor))

    def _receive(self, like: torch.Tensor, axis: GroupAxis, step: int) -> torch.Tensor:
        buffer = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        dist.recv(buffer, axis.ranks[axis.coordinate + step], group=axis.group)
        return buffer
