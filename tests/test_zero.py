"""Every ZeRO stage under every mesh trains as one process does: losses, each gradient, norm, weights after several steps."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.muon import muon_optimizer
from torch import nn

from lightning_par.errors import CheckpointError, ConfigurationError
from lightning_par.gradients import clip_by_norm, clip_by_value, global_norm, sum_shared_gradients
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.private import DEEPSPEED_VERSION, check_deepspeed
from lightning_par.zero.engine import DeepSpeedStates
from lightning_par.zero.replicated import ReplicatedStates
from lightning_par.zero.states import OptimizerStates
from tests import zero_model
from tests.ranks import run_ranks
from tests.zero_model import Case, Model

PRELOADED = (deepspeed, muon_optimizer)  # imported before the fork: DeepSpeed would import the second, for seconds, in each rank
NUM_STEPS = 3


class Run:
    """One rank's model, optimizer states and learning-rate schedule."""

    def __init__(self, case: Case, mesh: Mesh) -> None:
        self.case, self.mesh = case, mesh
        self.model = Model(case, mesh.coordinate.pp, mesh.tp)
        self.optimizer = zero_model.build_optimizer(self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.states: OptimizerStates = (
            DeepSpeedStates(self.model, [self.optimizer], case.zero, mesh)
            if case.zero
            else ReplicatedStates(self.model, [self.optimizer], mesh.dp)
        )

    def accumulate(self, step: int) -> float:
        """All forwards, then all backwards, as often as gradients are accumulated. Returns this replica's loss."""
        total = 0.0
        for part in range(self.case.num_accumulated):
            with self.states.accumulate():
                total += self._microbatches(step * self.case.num_accumulated + part)
        return total

    def evaluate(self, step: int) -> float:
        """The loss that `accumulate` is about to have."""
        total = 0.0
        for part in range(self.case.num_accumulated):
            batches = zero_model.microbatches(step * self.case.num_accumulated + part, self.mesh.dp.coordinate)
            with torch.no_grad(), self.states.evaluate():
                losses = [self._forward(*batch)[1] for batch in batches]
            total += sum(map(float, losses)) / self.case.num_accumulated if self.mesh.is_last_stage else 0.0
        return total

    def reduce(self) -> torch.Tensor:
        """Every sum and the clip. Returns the norm before it."""
        sum_shared_gradients(self.model.parameters(), self.mesh)
        self.states.reduce()
        norm = global_norm(self.states, self.mesh)
        if self.case.max_norm is not None:
            clip_by_norm(self.states, self.case.max_norm, norm)
        if self.case.max_value is not None:
            clip_by_value(self.states, self.case.max_value)
        return norm

    def step(self) -> None:
        self.states.step()
        self.states.zero_grad()
        self.schedule.step()

    def _microbatches(self, step: int) -> float:
        inputs, outputs, total = [], [], 0.0
        for batch in zero_model.microbatches(step, self.mesh.dp.coordinate):
            hidden, output = self._forward(*batch)
            inputs.append(hidden)
            outputs.append(output / self.case.num_accumulated if self.mesh.is_last_stage else output)
            total += float(outputs[-1]) if self.mesh.is_last_stage else 0.0
        for hidden, output in zip(inputs, outputs, strict=True):
            torch.autograd.backward(output, zero_model.receive(None, self.mesh, step=1))
            self.states.after_backward()
            zero_model.send(hidden.grad, self.mesh, step=-1)
        return total

    def _forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = zero_model.receive(tokens, self.mesh, step=-1)
        if not self.mesh.is_first_stage:
            hidden.requires_grad_(torch.is_grad_enabled())
        output = zero_model.run_stage(self.model, hidden)
        self.states.after_forward()
        if self.mesh.is_last_stage:
            return hidden, zero_model.loss_of(output, targets)
        zero_model.send(output, self.mesh, step=1)
        return hidden, output


@contextmanager
def running(case: Case) -> Iterator[Run]:
    """Build, and close: afterwards nothing may keep the model alive, nor DeepSpeed's hooks the next case."""
    run = Run(case, zero_model.build_mesh(case))
    yield run
    run.states.close()
    model = weakref.ref(run.model)
    vars(run).clear()
    gc.collect()
    assert model() is None, "something keeps the model alive after close()"


def gathered_gradients(run: Run) -> dict[str, torch.Tensor]:
    """Every gradient of this rank's parameters, flat, put together from the fragments of all dp ranks in order."""
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    mine = {names[p]: fragment.flatten().clone() for fragment, p, is_counted in run.states.gradients() if is_counted}
    parts = [mine] * run.mesh.dp.size
    dist.all_gather_object(parts, mine, group=run.mesh.dp.group)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names.values() if any(name in part for part in parts)}


def check_parity(run: Run) -> None:
    """Compare each step with the same training in one process."""
    mesh, replicas = run.mesh, run.mesh.dp.size
    alone = zero_model.train_alone(run.case, NUM_STEPS)
    for step, (reference, loss, norm) in zip(range(NUM_STEPS), alone, strict=False):
        losses = torch.tensor([run.evaluate(step), run.accumulate(step), run.evaluate(step)])
        mesh.dp.all_reduce(losses)
        if mesh.is_last_stage:
            torch.testing.assert_close(losses / replicas, torch.full((3,), loss), rtol=1e-5, atol=0)
        torch.testing.assert_close(run.reduce().item(), norm, rtol=2e-5, atol=0)
        expected = dict(reference.named_parameters())
        gradients = gathered_gradients(run)
        for name, parameter in run.model.named_parameters():
            assert (name in gradients) == (expected[name].grad is not None), name
            if name in gradients:
                whole = zero_model.local(expected[name].grad, parameter, mesh).flatten()
                torch.testing.assert_close(gradients[name][: whole.numel()], whole, rtol=2e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
        run.step()
    check_weights(run, next(alone)[0])


def check_weights(run: Run, reference: nn.Module) -> None:
    expected, parameters = dict(reference.named_parameters()), dict(run.model.named_parameters())
    for name, value in run.states.full_parameters():
        whole = zero_model.local(expected[name], parameters[name], run.mesh)
        torch.testing.assert_close(value, whole.detach(), rtol=0, atol=3e-6, msg=lambda m, name=name: f"{name}: {m}")


def check_cases(rank: int, world_size: int, cases: list[Case]) -> None:
    for case in cases:
        try:
            with running(case) as run:
                check_parity(run)
        except Exception as error:
            raise AssertionError(f"{case}") from error


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("mesh", [(1, 2, 1), (2, 2, 1), (1, 2, 2)], ids=str)
def test_training_equals_one_process(zero: int, mesh: tuple[int, int, int]) -> None:
    plain = Case(*mesh, zero)
    run_ranks(check_cases, plain.layout.world_size, [plain])
