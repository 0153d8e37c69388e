"""Point-to-point traffic between the stages of a pipeline.

Activations and gradients travel on process groups of their own, and each of these up and down the ranks on groups of their
own, so that no message waits behind one of another kind. A send returns at once and keeps its tensor alive until it has left;
a receive may be posted before the stage needs it. What two stages on one rank give each other stays where it is.

Messages between two ranks on one group carry tags, which gloo heeds; NCCL delivers them in the order in which they were sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist

from lightning_par.layout import Layout
from lightning_par.pipeline.action import Action
from lightning_par.runtime.axis import GroupAxis

Like: TypeAlias = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor that travels

_MAX_TENSORS, _MAX_DIMS = 64, 8
_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


class _Route(NamedTuple):
    """How a message travels.

    Attributes:
        group: on which group.
        peer: coordinate of the rank at the other end; this rank's own where the message stays.
        tag: of its header; its tensors have the next ones.
    """

    group: dist.ProcessGroup
    peer: int
    tag: int


class Transport:
    """Sends and receives of one rank.

    A message is named by the action that consumes it: F of a stage takes activations, B gradients, whether its
    backward is one or in halves.

    Args:
        layout: where the stages are.
        activations, gradients: the pipeline's ranks, for each kind of message twice: towards higher and lower coordinates.
        device: where tensors are.

    Attributes:
        sent_bytes: what this rank has sent to others.
    """

    def __init__(
        self,
        layout: Layout,
        activations: tuple[GroupAxis, GroupAxis],
        gradients: tuple[GroupAxis, GroupAxis],
        device: torch.device,
    ) -> None:
        self._device = device
        self.sent_bytes = 0
        self._groups = {"F": activations, "B": gradients}
        self._coordinate = activations[0].coordinate
        self._pp_of = [layout.pp_of(stage) for stage in range(layout.num_stages)]
        self._routes: dict[Action, _Route] = {}
        self._leaving: list[tuple[dist.Work, torch.Tensor]] = []
        self._posted: dict[Action, list[tuple[dist.Work, torch.Tensor]]] = {}
        self._local: dict[Action, list[torch.Tensor]] = {}

    @property
    def on_the_way(self) -> list[torch.Tensor]:
        """Tensors that are leaving, and those that receives have begun into; what two stages here give each other too."""
        received = [buffer for posted in self._posted.values() for _, buffer in posted]
        local = [tensor for tensors in self._local.values() for tensor in tensors]
        return [*(tensor for _, tensor in self._leaving), *received, *local]

    def pp_of(self, stage: int) -> int:
        """The pp coordinate that runs a stage."""
        return self._pp_of[stage]

    def is_remote(self, message: Action) -> bool:
        """Whether a message comes from another rank."""
        return self._pp_of[_sender(message)] != self._coordinate

    def send(self, message: Action, tensors: Sequence[torch.Tensor], with_header: bool = False) -> None:
        """Send ``tensors`` to the stage of ``message``; before them, where asked for, what they are like."""
        sent = [tensor.detach().contiguous() for tensor in tensors]
        group, peer, tag = self._route(message)
        if peer == self._coordinate:
            self._local[message] = sent
            return
        if with_header:
            header = _header([(tuple(tensor.shape), tensor.dtype) for tensor in sent], self._device)
            self._leaving.append((group.send([header], peer, tag), header))
            self.sent_bytes += header.nbytes
        for entry, tensor in enumerate(sent, 1):
            self.sent_bytes += tensor.nbytes
            self._leaving.append((group.send([tensor], peer, tag + entry), tensor))
        if len(self._leaving) > 8:
            self._leaving = [(work, kept) for work, kept in self._leaving if not work.is_completed()]

    def post(self, message: Action, likes: Sequence[Like]) -> None:
        """Begin to receive a message from another rank."""
        (group, peer, tag), device = self._route(message), self._device
        posted = self._posted[message] = []
        for entry, (shape, dtype) in enumerate(likes, 1):
            buffer = torch.empty(shape, dtype=dtype, device=device)
            posted.append((group.recv([buffer], peer, tag + entry), buffer))

    def receive(self, message: Action, likes: Sequence[Like]) -> list[torch.Tensor]:
        """The tensors of a message. Waits."""
        local = self._local.pop(message, None)
        if local is not None:
            return local
        if message not in self._posted:
            self.post(message, likes)
        received = []
        for work, buffer in self._posted.pop(message):
            work.wait()
            received.append(buffer)
        return received

    def receive_header(self, message: Action, num_tensors: int) -> list[Like]:
        """What the tensors of a message are like, where its sender says so. Waits."""
        group, peer, tag = self._route(message)
        header = torch.empty(num_tensors * (_MAX_DIMS + 2), dtype=torch.int64, device=self._device)
        group.recv([header], peer, tag).wait()
        rows = header.view(num_tensors, -1).tolist()
        return [(tuple(row[2 : 2 + row[1]]), _DTYPES[row[0]]) for row in rows]

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for work, _ in self._leaving:
            work.wait()
        self._leaving.clear()

    def _route(self, message: Action) -> _Route:
        route = self._routes.get(message)
        if route is None:
            sender, receiver = self._pp_of[_sender(message)], self._pp_of[message.stage]
            group = self._groups[message.kind][receiver < sender].group
            tag = (message.microbatch * len(self._pp_of) + message.stage) * _MAX_TENSORS
            peer = receiver if sender == self._coordinate else sender
            route = self._routes[message] = _Route(group, peer, tag)
        return route


def _sender(message: Action) -> int:
    """The stage that makes what an action consumes."""
    return message.stage - 1 if message.kind == "F" else message.stage + 1


def _header(likes: Sequence[Like], device: torch.device) -> torch.Tensor:
    assert len(likes) < _MAX_TENSORS
    rows = [[_DTYPES.index(dtype), len(shape), *shape, *[0] * (_MAX_DIMS - len(shape))] for shape, dtype in likes]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1)
