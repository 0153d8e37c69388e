"""The engine: executes one rank's row of a schedule table."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_par.errors import ModelError
from lightning_par.pipeline.action import Action, Row
from lightning_par.pipeline.arrival import Arrival
from lightning_par.pipeline.stage import StageProgram, returned
from lightning_par.pipeline.transport import Like, Transport
from lightning_par.runtime.deferral import DeferredGradients

Program = Callable[[int], Any]
_EVERY_STEP = ": every step of a pipeline runs all blocks; do not return early, and let no bare `except:` stop a step"
_NUM_POSTED = 4  # receives that are begun before the action that needs them


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


@dataclass
class _InFlight:
    """What is kept between a microbatch's forward and its backward: no activation that has left.

    Attributes:
        arrival: what was received.
        left: of every tensor that left and has a gradient, where its gradient enters the graph and what it is like.
    """

    arrival: Arrival = field(default_factory=Arrival)
    left: list[tuple[GradientEdge | None, Like]] = field(default_factory=list)


@dataclass
class _Step:
    """One call of `Executor.run` in progress."""

    program: Program
    loss_of: Callable[[Any], torch.Tensor]
    weights: Sequence[float | torch.Tensor]
    shapes: Sequence[Hashable]
    flying: dict[tuple[int, int], _InFlight] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)

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
            What the user's step returned for each microbatch on the rank of the last stage, detached from the graph's loss only
            by the backward that has run; an empty list on the others.
        """
        step = _Step(program, loss_of, weights, shapes)
        self._deferred.forget()  # what a step that failed has left
        remote = [action for action in row if self._is_remote(action)]
        num_passed = 0
        self._post_ahead(remote[:_NUM_POSTED], step)
        for action in row:
            num_passed += num_passed < len(remote) and action is remote[num_passed]
            self._begin(action)
            if action.kind == "F":
                self._forward(action, step)
            elif action.kind == "W":
                self._deferred.run((action.stage, action.microbatch))
            else:
                self._backward(action, step)
            self._end()
            self._post_ahead(remote[num_passed : num_passed + _NUM_POSTED], step)
        self._transport.flush()
        return [step.outputs[index] for index in sorted(step.outputs)]

    # ------------------------------------------------------------------ actions

    def _forward(self, action: Action, step: _Step) -> None:
        stage, index = action.stage, action.microbatch
        kept, self.running = _InFlight(), stage
        self.hooks.before_forward(index)
        try:
            output, leaving = self._stages.run(
                stage,
                lambda: step.program(index),
                None if stage == 0 else lambda held: self._receive(action, held, step),
                kept.arrival,
                lambda: self.hooks.at_entrance(index, stage),
            )
        finally:
            self.running = None
        self.hooks.after_forward()
        if stage > 0 and kept.arrival.hidden is None:
            raise ModelError(f"the step on microbatch {index} ended before it reached the blocks of stage {stage}{_EVERY_STEP}")
        if stage == self._last:
            step.outputs[index] = output
        elif not leaving:
            raise ModelError(f"the step on microbatch {index} ended before it reached the blocks of stage {stage + 1}{_EVERY_STEP}")
        else:
            self._send(Action("F", stage + 1, index), leaving, step)
        if torch.is_grad_enabled():
            returns = returned(self._stages.cuts[stage].leaving)
            kept.left = [(_edge(tensor), _like(tensor)) for tensor, has in zip(leaving, returns, strict=False) if has]
            step.flying[stage, index] = kept

    def _backward(self, action: Action, step: _Step) -> None:
        stage, index = action.stage, action.microbatch
        kept = step.flying.pop((stage, index))
        puts_off = self._deferred.collecting((stage, index)) if action.kind == "I" else nullcontext()
        with self._stages.backward(stage, kept.arrival, lambda: self.hooks.at_entrance(index, stage)), puts_off:
            if stage == self._last:
                (step.loss_of(step.outputs[index]) * step.weights[index]).backward()
            else:
                arrived = self._take(Action("B", stage, index), [like for _, like in kept.left])
                pairs = [(edge, grad) for (edge, _), grad in zip(kept.left, arrived, strict=True) if edge is not None]
                if pairs:  # none where everything up to here is frozen
                    torch.autograd.backward([edge for edge, _ in pairs], [grad for _, grad in pairs])
        if stage > 0:
            self._transport.send(Action("B", stage - 1, index), kept.arrival.gradients())
        self.hooks.after_backward()

    # ------------------------------------------------------------------ messages

    def _is_remote(self, action: Action) -> bool:
        is_end = action.stage == (0 if action.kind == "F" else self._last)
        return action.kind != "W" and not is_end and self._transport.is_remote(_message(action))

    def _post_ahead(self, actions: Sequence[Action], step: _Step) -> None:
        """Begin the receives of coming actions, where it is known what will come.

        None overtakes another of its kind: over NCCL messages have no tags.
        """
        unknown = set()
        for action in actions:
            message = _message(action)
            if message.kind not in unknown and not self._transport.is_posted(message):
                likes = self._expected(action, step)
                if likes is None:
                    unknown.add(message.kind)
                else:
                    self._transport.post(message, likes)

    def _expected(self, action: Action, step: _Step) -> list[Like] | None:
        if action.kind == "F":
            return self._known.get(step.key(action.stage, action.microbatch))
        kept = step.flying.get((action.stage, action.microbatch))
        return None if kept is None else [like for _, like in kept.left]

    def _send(self, message: Action, leaving: list[torch.Tensor], step: _Step) -> None:
        key, likes = step.key(message.stage, message.microbatch), [_like(tensor) for tensor in leaving]
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
        key, likes = step.key(action.stage, action.microbatch), [_like(tensor) for tensor in held]
        is_told = self._stages.is_told(action.stage) and self._transport.is_remote(action)
        if key in self._known:
            likes = self._known[key]
        elif is_told:
            likes = self._told(action, len(held))
        if key is not None:
            self._known[key] = likes
        return self._take(action, likes)

    def _told(self, action: Action, num_tensors: int) -> list[Like]:
        with self._waiting():
            return self._transport.receive_header(action, num_tensors)

    def _take(self, message: Action, likes: list[Like]) -> list[torch.Tensor]:
        with self._waiting():
            return self._transport.receive(message, likes)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        for observer in self.observers:
            observer.wait()
        yield
        for observer in self.observers:
            observer.arrive()

    def _begin(self, action: Action) -> None:
        for observer in self.observers:
            observer.begin(action)

    def _end(self) -> None:
        for observer in self.observers:
            observer.end()


def _message(action: Action) -> Action:
    """The name of what an action consumes: gradients have one, whatever is computed with them."""
    return action if action.kind == "F" else Action("B", action.stage, action.microbatch)


def _edge(tensor: torch.Tensor) -> GradientEdge | None:
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _like(tensor: torch.Tensor) -> Like:
    return tuple(tensor.shape), tensor.dtype


def _shapes(likes: Sequence[Like]) -> str:
    return ", ".join(str(list(shape)) for shape, _ in likes)
