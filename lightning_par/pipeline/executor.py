"""The engine: executes one stage's row of a schedule table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_par.errors import ModelError
from lightning_par.pipeline.action import Row
from lightning_par.pipeline.stage import Receive, Stage
from lightning_par.pipeline.transport import Transport
from lightning_par.runtime.watchdog import Watchdog

Program = Callable[[int], Any]
_EVERY_STEP = ": every step of a pipeline runs all blocks; do not return early, and let no bare `except:` stop a step"


@dataclass
class Hooks:
    """What others do at fixed points of a step.

    Attributes:
        before_forward: called with the microbatch's index before the user's step runs.
        at_entrance: called with it when a later stage replaces the hidden state.
        after_forward: called after each forward, in its grad mode.
        after_backward: called after each microbatch's backward.
    """

    before_forward: Callable[[int], None] = lambda microbatch: None
    at_entrance: Callable[[int], None] = lambda microbatch: None
    after_forward: Callable[[], None] = lambda: None
    after_backward: Callable[[], None] = lambda: None


@dataclass
class _InFlight:
    """Tensors kept between a microbatch's forward and its backward."""

    receive: Receive | None = None
    received: torch.Tensor | None = None
    leaving: torch.Tensor | None = None


@dataclass
class Executor:
    """Runs the actions of one stage in the order of its row.

    Attributes:
        stage: the module's part on this rank.
        transport: the way to the neighbours.
        hooks: what else happens during a step.
        watchdog: is told what this rank does.
    """

    stage: Stage
    transport: Transport
    hooks: Hooks = field(default_factory=Hooks)
    watchdog: Watchdog = field(default_factory=Watchdog)

    def run(self, row: Row, program: Program, loss_of: Callable[[Any], torch.Tensor], weights: Sequence[float]) -> list[Any]:
        """Execute ``row``. Called by every rank of the pipeline with its own row of one table.

        Args:
            row: this stage's actions.
            program: calls the user's step on one microbatch, by index.
            loss_of: the loss in what the step returned.
            weights: factor of each microbatch's loss in the backward.

        Returns:
            What the user's step returned for each microbatch on the last stage, detached from the graph's loss only by
            the backward that has run; an empty list on the others.
        """
        flying: dict[int, _InFlight] = {}
        outputs: dict[int, Any] = {}
        for action in row:
            self.watchdog.begin(action)
            if action.kind == "F":
                flying[action.microbatch] = self._forward(action.microbatch, program, outputs)
            else:
                loss = loss_of(outputs[action.microbatch]) if self.transport.is_last else None
                self._backward(flying.pop(action.microbatch), loss, weights[action.microbatch])
                self.hooks.after_backward()
            self.watchdog.end()
        self.transport.flush()
        return [outputs[index] for index in sorted(outputs)]

    def _forward(self, index: int, program: Program, outputs: dict[int, Any]) -> _InFlight:
        kept = _InFlight()
        needs_grad = torch.is_grad_enabled()  # asked out here: reentrant checkpointing calls the block without gradients

        is_running = True

        def receive(like: torch.Tensor) -> torch.Tensor:
            if kept.received is not None and is_running:
                raise ModelError(
                    f"the step on microbatch {index} calls the blocks of this stage a second time (model.generate does, for each "
                    "token), and a pipeline stage runs its blocks once for each microbatch: use a layout without pp for such a step"
                )
            if kept.received is None:  # else a backward runs the block again
                self.watchdog.wait()
                kept.received = self.transport.receive_activation(like).requires_grad_(needs_grad)
                self.watchdog.arrive()
            self.hooks.at_entrance(index)
            return kept.received

        kept.receive = None if self.transport.is_first else receive
        self.hooks.before_forward(index)
        output, kept.leaving = self.stage.run(lambda: program(index), kept.receive)
        is_running = False
        self.hooks.after_forward()
        if kept.received is None and not self.transport.is_first:
            raise ModelError(f"the step on microbatch {index} ended before it reached the blocks of this stage{_EVERY_STEP}")
        if self.transport.is_last:
            outputs[index] = output
        elif kept.leaving is None:
            raise ModelError(f"the step on microbatch {index} ended before it reached the blocks of the next stage{_EVERY_STEP}")
        else:
            self.transport.send_activation(kept.leaving)
        return kept

    def _backward(self, kept: _InFlight, loss: torch.Tensor | None, weight: float) -> None:
        with self.stage.receiving(kept.receive):
            if loss is not None:
                (loss * weight).backward()
            elif kept.leaving is not None:
                self.watchdog.wait()
                arrived = self.transport.receive_gradient(kept.leaving)
                self.watchdog.arrive()
                if kept.leaving.requires_grad:  # false where everything up to here is frozen
                    torch.autograd.backward(kept.leaving, arrived)
        if kept.received is not None:
            grad = kept.received.grad
            self.transport.send_gradient(torch.zeros_like(kept.received) if grad is None else grad)
