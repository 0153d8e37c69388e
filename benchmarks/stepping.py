"""What a step is in all systems: forward, backward, the reductions over ranks, and one step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_par.engine import Engine
from lightning_par.gradients import sum_shared_gradients
from lightning_par.layout import parse_layout
from lightning_par.prepare import prepare_plan
from lightning_par.runtime.mesh import Mesh

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Step = Callable[[], torch.Tensor]  # one step, collective over all ranks; the loss of this rank's batch
CPU = torch.device("cpu")


def engine_step(module: Any, tokens: torch.Tensor, word: str, num_ranks: int, make_optimizer: MakeOptimizer) -> Step:
    """The step of lightning_par, as its strategy installs it and steps. Collective over all ranks.

    Args:
        module: has ``training_step``; changed in place.
        tokens: the batch of this replica, the same in every step.
        word: the layout.
        num_ranks: in it.
        make_optimizer: makes it of what this rank holds.
    """
    layout = parse_layout(word).resolve(num_ranks)
    plan = prepare_plan(module, tokens, layout)
    mesh = Mesh(layout, timedelta(seconds=60))
    engine = Engine(module, plan, mesh, CPU)
    parameters = list(module.parameters())
    states = engine.own_states([make_optimizer(parameters)])

    def step() -> torch.Tensor:
        (loss,) = engine.train(lambda index: module.training_step(tokens, 0), [1.0], lambda loss: loss, [tuple(tokens.shape)])
        sum_shared_gradients(parameters, mesh)
        states.reduce()
        states.step()
        states.zero_grad()
        return loss.detach()

    return step


def plain_step(forward: Callable[[], torch.Tensor], optimizer: Optimizer) -> Step:
    """The step that anyone writes, of a model that reduces what it must by itself.

    Args:
        forward: gives the loss of this rank's batch.
        optimizer: of the model.
    """

    def step() -> torch.Tensor:
        loss = forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return whole(loss)

    return step


def whole(loss: torch.Tensor) -> torch.Tensor:
    """The number alone, where a DTensor has it on every rank."""
    found: torch.Tensor = (loss.to_local() if isinstance(loss, DTensor) else loss).detach()
    return found
