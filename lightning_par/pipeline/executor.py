"""The engine: executes one rank's row of a schedule table."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import Any, Protocol, TypeVar

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_par.errors import ModelError
from lightning_par.pipeline.action import Action, Row
from lightning_par.pipeline.arrival import Arrival
from lightning_par.pipeline.stage import StageProgram
from lightning_par.pipeline.transport import Like, Transport
from lightning_par.private.torch import run_backward
from lightning_par.runtime.deferral import DeferredGradients
from lightning_par.runtime.nested import map_tensors

Program = Callable[[int], Any]
_Received = TypeVar("_Received")
_EVERY_STEP = ": every step of a pipeline runs all blocks; do not return early, and let no bare `except:` stop a step"
_MOST_POSTED, _FEWEST_POSTED = 8, 4  # receives that are begun before the action that needs them; see `Executor._post_ahead`


class Observer(Protocol):
    """Sees when a rank does what."""

    def begin(self, action: Action) -> None:
        """An action begins."""

    def wait(self) -> None:
        """The rank waits for what another one sends."""

    def arrive(self) -> None:
        """It is there."""

    def end(self) -> None:
        """The action has ended."""


@dataclass
class Hooks:
    """What others do at fixed points of a step.

    Attributes:
        before_forward: called with the microbatch's index before the user's step runs.
        at_entrance: called with it and the stage where a later stage's blocks begin.
        after_forward: called after each forward, in its grad mode.
        after_backward: called after each microbatch's backward.
    """

    before_forward: Callable[[int], None] = lambda microbatch: None
    at_entrance: Callable[[int, int], None] = lambda microbatch, stage: None
    after_forward: Callable[[], None] = lambda: None
    after_backward: Callable[[], None] = lambda: None


@dataclass(slots=True)
class _InFlight:
    """What is kept between a microbatch's forward and its backward: no activation that has left.

    Attributes:
        arrival: what was received.
        edges: of every tensor that left and that a gradient comes back of, where it enters the graph, if anywhere.
        likes: what these gradients are like.
    """

    arrival: Arrival
    edges: list[GradientEdge | None]
    likes: list[Like]


@dataclass(frozen=True, slots=True)
class _Traffic:
    """What a rank receives from others.

    Attributes:
        row: in which actions.
        messages: for each of them; None where it needs none.
        by_kind: activations and gradients, each in order, with their places among all.
    """

    row: Row = ()
    messages: list[Action | None] = field(default_factory=list)
    by_kind: list[list[tuple[int, Action]]] = field(default_factory=list)


@dataclass(slots=True)
class _Step:
    """One call of `Executor.run` in progress.

    Attributes:
        program, loss_of, weights, shapes: as there.
        flying: what is kept of each microbatch on each stage.
        outputs: what the user's step returned for each microbatch on the last stage.
        unposted: the receives from other ranks that have not begun, of each kind, with their places among all.
        num_taken: those whose action has begun.
    """

    program: Program
    loss_of: Callable[[Any], torch.Tensor]
    weights: Sequence[float | torch.Tensor]
    shapes: Sequence[Hashable]
    flying: dict[tuple[int, int], _InFlight] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    unposted: tuple[deque[tuple[int, Action]], ...] = ()
    num_taken: int = 0

    def key(self, stage: int, microbatch: int) -> Hashable:
        """What the shapes that a stage receives follow from; None where that is not known."""
        return (stage, self.shapes[microbatch]) if self.shapes else None


class Executor:
    """Runs the actions of one rank in the order of its row.

    Args:
        stages: the module's stages on this rank.
        transport: the way to the other ranks.
        hooks: what else happens during a step.
        deferred: the weight gradients that W computes.

    Attributes:
        observers: who sees the actions.
        running: the stage whose forward runs now.
    """

    def __init__(
        self,
        stages: StageProgram,
        transport: Transport,
        hooks: Hooks | None = None,
        deferred: DeferredGradients | None = None,
    ) -> None:
        self._stages, self._transport, self.hooks = stages, transport, hooks or Hooks()
        self._deferred = deferred or DeferredGradients()
        self._known: dict[Hashable, list[Like]] = {}  # what was sent or received before, by `_Step.key`
        self._last = len(stages.cuts) - 1
        self.observers: list[Observer] = []
        self.running: int | None = None
        self._traffic = _Traffic()  # of the last row

    def run(
        self,
        row: Row,
        program: Program,
        loss_of: Callable[[Any], torch.Tensor],
        weights: Sequence[float | torch.Tensor],
        shapes: Sequence[Hashable] = (),
    ) -> list[Any]:
        """Execute ``row``. Called by every rank of the pipeline with its own row of one table.

        Args:
            row: this rank's actions.
            program: calls the user's step on one microbatch, by index.
            loss_of: the loss in what the step returned.
            weights: factor of each microbatch's loss in the backward.
            shapes: of each microbatch, what all shapes in the step follow from, so that a receive can begin before it is
                needed; empty where they may depend on values.

        Returns:
            What the user's step returned for each microbatch on the rank of the last stage, without a graph where it has been run
            backward; an empty list on the others.
        """
        step = _Step(program, loss_of, weights, shapes)
        self._deferred.forget()  # what a step that failed has left
        if row is not self._traffic.row:
            self._traffic = self._read(row)
        step.unposted = tuple(map(deque, self._traffic.by_kind))
        self._post_ahead(step)
        for action, message in zip(row, self._traffic.messages, strict=True):
            step.num_taken += message is not None
            for observer in self.observers:
                observer.begin(action)
            if action.kind == "F":
                self._forward(action, step)
            elif action.kind == "W":
                self._deferred.run((action.stage, action.microbatch))
            else:
                self._backward(action, step)
            for observer in self.observers:
                observer.end()
            self._post_ahead(step)
        self._transport.flush()
        return [step.outputs[index] for index in sorted(step.outputs)]

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent to other stages."""
        return self._transport.sent_bytes

    @property
    def on_the_way(self) -> list[torch.Tensor]:
        """What this rank holds of messages, see `Transport.on_the_way`."""
        return self._transport.on_the_way

    # ------------------------------------------------------------------ actions

    def _forward(self, action: Action, step: _Step) -> None:
        _, stage, index = action
        arrival, likes = Arrival(), list[Like]()
        self.running = stage
        self.hooks.before_forward(index)
        try:
            output, leaving = self._stages.run(
                stage,
                lambda: step.program(index),
                None if stage == 0 else lambda held: self._receive(action, held, step),
                arrival,
                lambda: self.hooks.at_entrance(index, stage),
            )
        finally:
            self.running = None
        self.hooks.after_forward()
        if stage > 0 and arrival.hidden is None:
            raise ModelError(f"the step on microbatch {index} ended before it reached the blocks of stage {stage}{_EVERY_STEP}")
        if stage == self._last:
            step.outputs[index] = output
        elif not leaving:
            raise ModelError(f"the step on microbatch {index} ended before it reached the blocks of stage {stage + 1}{_EVERY_STEP}")
        else:
            likes = [_like(tensor) for tensor in leaving]
            self._send(Action("F", stage + 1, index), leaving, likes, step)
        if torch.is_grad_enabled():
            returns = self._stages.cuts[stage].leaving_returns
            edges = [_edge(tensor) for tensor in compress(leaving, returns)]
            step.flying[stage, index] = _InFlight(arrival, edges, list(compress(likes, returns)))

    def _backward(self, action: Action, step: _Step) -> None:
        kind, stage, index = action
        kept = step.flying.pop((stage, index))
        puts_off = self._deferred.collecting((stage, index)) if kind == "I" else nullcontext()
        with self._stages.backward(stage, kept.arrival, lambda: self.hooks.at_entrance(index, stage)), puts_off:
            if stage == self._last:
                loss = step.loss_of(step.outputs[index])
                run_backward([loss], [_scaled_one(loss, step.weights[index])])
                del loss
                # the rest of its graph would keep what this microbatch received until the step ends
                step.outputs[index] = map_tensors(torch.Tensor.detach, step.outputs[index])
            else:
                arrived = self._take(Action("B", stage, index), kept.likes)
                pairs = [(edge, grad) for edge, grad in zip(kept.edges, arrived, strict=True) if edge is not None]
                if pairs:  # none where everything up to here is frozen
                    run_backward([edge for edge, _ in pairs], [grad for _, grad in pairs])
        if stage > 0:
            self._transport.send(Action("B", stage - 1, index), kept.arrival.gradients())
        self.hooks.after_backward()

    # ------------------------------------------------------------------ messages

    def _read(self, row: Row) -> _Traffic:
        messages = [self._message(action) for action in row]
        remote = list(enumerate(message for message in messages if message is not None))
        return _Traffic(row, messages, [[entry for entry in remote if entry[1].kind == kind] for kind in "FB"])

    def _message(self, action: Action) -> Action | None:
        """What an action takes from another rank. Gradients have one name, whatever is computed with them."""
        kind, stage, index = action
        if kind == "W" or stage == (0 if kind == "F" else self._last):
            return None
        message = action if kind == "F" else Action("B", stage, index)
        return message if self._transport.is_remote(message) else None

    def _post_ahead(self, step: _Step) -> None:
        """Begin the next receives, where it is known what will come.

        Several at once, which takes less of the host's time than one after each action. Over gloo a message whose receive has
        begun goes at once; else its sender asks first. None overtakes another of its kind: over NCCL messages have no tags.
        """
        for unposted in step.unposted:
            if unposted and unposted[0][0] >= step.num_taken + _FEWEST_POSTED:
                continue
            while unposted and unposted[0][0] < step.num_taken + _MOST_POSTED:
                place, message = unposted[0]
                if place >= step.num_taken:
                    likes = self._expected(message, step)
                    if likes is None:
                        break
                    self._transport.post(message, likes)
                unposted.popleft()

    def _expected(self, message: Action, step: _Step) -> list[Like] | None:
        kind, stage, index = message
        if kind == "F":
            return self._known.get(step.key(stage, index))
        kept = step.flying.get((stage, index))
        return None if kept is None else kept.likes

    def _send(self, message: Action, leaving: list[torch.Tensor], likes: list[Like], step: _Step) -> None:
        key = step.key(message.stage, message.microbatch)
        known = None if key is None else self._known.setdefault(key, likes)
        if known is not None and known != likes:
            raise ModelError(
                f"stage {message.stage - 1} passes on tensors of shape {_shapes(likes)} for microbatch {message.microbatch}, and "
                f"passed on {_shapes(known)} before, for a microbatch of the same shapes: let all shapes in a step follow from "
                "those of its batch, so crop and pad in the dataset"
            )
        is_news = known is None or known is likes
        self._transport.send(message, leaving, with_header=is_news and self._stages.is_told(message.stage))

    def _receive(self, action: Action, held: list[torch.Tensor], step: _Step) -> list[torch.Tensor]:
        """What stage ``action.stage`` gets for a microbatch, in the place of the tensors ``held``."""
        key = step.key(action.stage, action.microbatch)
        likes = self._known.get(key)
        if likes is None:
            if self._stages.is_told(action.stage) and self._transport.is_remote(action):
                likes = self._wait(partial(self._transport.receive_header, action, len(held)))
            else:
                likes = [_like(tensor) for tensor in held]
            if key is not None:
                self._known[key] = likes
        return self._take(action, likes)

    def _take(self, message: Action, likes: list[Like]) -> list[torch.Tensor]:
        return self._wait(partial(self._transport.receive, message, likes))

    def _wait(self, receive: Callable[[], _Received]) -> _Received:
        for observer in self.observers:
            observer.wait()
        received = receive()
        for observer in self.observers:
            observer.arrive()
        return received


def _scaled_one(loss: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """The gradient of ``weight * loss`` with respect to ``loss``."""
    return weight.to(loss).expand_as(loss) if isinstance(weight, torch.Tensor) else torch.full_like(loss, weight)


def _edge(tensor: torch.Tensor) -> GradientEdge | None:
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _like(tensor: torch.Tensor) -> Like:
    return tuple(tensor.shape), tensor.dtype


def _shapes(likes: Sequence[Like]) -> str:
    return ", ".join(str(list(shape)) for shape, _ in likes)
