"""One rank's part of a plan in motion: the installed module, its schedule, its streams of random numbers.

Knows nothing of Lightning: it is given a program that runs the user's step on one microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_par.install import install
from lightning_par.pipeline.executor import Executor, Hooks
from lightning_par.pipeline.schedules import build_schedule, forward_only
from lightning_par.pipeline.transport import Transport
from lightning_par.plan import Plan
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.streams import MicrobatchStreams
from lightning_par.runtime.watchdog import Watchdog
from lightning_par.zero.partitioned import DeepSpeedStates
from lightning_par.zero.replicated import ReplicatedStates
from lightning_par.zero.states import OptimizerStates

Program = Callable[[int], Any]


class Engine:
    """Runs the steps of an installed module. Every rank of the mesh makes the same calls.

    A module is installed once; its engine serves every Trainer that comes after.

    Attributes:
        plan: all decisions.
        mesh: this rank's axes.
        module: the user's module, installed in place.
        device: where it is.
        streams: random numbers.
        states: the owner of the optimizer states; None until something is trained.
        watchdog: knows what this rank is doing; watches once it is started.
    """

    _engines: ClassVar[WeakKeyDictionary[nn.Module, Engine]] = WeakKeyDictionary()

    def __init__(
        self, module: nn.Module, plan: Plan, mesh: Mesh, device: torch.device, schedule: str = "1f1b", seed: int = 0
    ) -> None:
        self.module, self.plan, self.mesh, self.device, self.schedule = module, plan, mesh, device, schedule
        broadcast_module(module, mesh)
        for stages in sorted({parameter.spec.stages for parameter in plan.parameters if len(parameter.spec.stages) > 1}):
            mesh.tied(stages)  # every rank makes every group, whether it holds such a weight or not
        for count in sorted({count for layer in plan.layers for count in layer.copies if count > 1}):
            mesh.copies(count)
        stage = install(module, plan, mesh.coordinate.pp, mesh.tp, device)
        module.to(device)
        self.streams = MicrobatchStreams(seed, mesh.coordinate.dp, mesh.coordinate.pp, device)
        self._hooks = Hooks(before_forward=self.streams.begin, at_entrance=self.streams.enter_stage)
        self.watchdog = Watchdog()
        self._executor = Executor(stage, Transport(mesh.pp, mesh.pp_backward), self._hooks, self.watchdog)
        self.states: OptimizerStates | None = None
        Engine._engines[module] = self

    @classmethod
    def of(cls, module: nn.Module) -> Engine | None:
        """The engine of an installed module."""
        return cls._engines.get(module)

    def own_states(self, optimizers: Sequence[Optimizer]) -> OptimizerStates:
        """Give the optimizers' states an owner: every replica, or DeepSpeed. Collective over the world."""
        layout = self.mesh.layout
        if self.states is not None:
            self.states.dissolve()
        if layout.zero and self.mesh.dp.size > 1:
            self.states = DeepSpeedStates(self.module, optimizers, layout.zero, self.mesh)
        else:
            self.states = ReplicatedStates(self.module, optimizers, self.mesh.dp)
        self._hooks.after_forward, self._hooks.after_backward = self.states.after_forward, self.states.after_backward
        return self.states

    def train(
        self, program: Program, sizes: Sequence[int], loss_of: Callable[[Any], torch.Tensor], scale: float = 1.0
    ) -> list[Any]:
        """Forward and backward of every microbatch; gradients add up in ``p.grad``. Collective over the replica.

        Args:
            program: runs the user's step on the microbatch of an index.
            sizes: samples in each; a microbatch's loss counts by its share of them.
            loss_of: the loss in what the step returned.
            scale: factor of the whole loss, 1 / accumulated batches.

        Returns:
            What the step returned for each microbatch, on the last stage; elsewhere an empty list.
        """
        table = build_schedule(self.schedule, self.mesh.layout.pp, len(sizes))
        weights = [scale * size / sum(sizes) for size in sizes]
        assert self.states is not None, "training needs an owner of the optimizer states"
        with self.watchdog.step("train"), self.streams.step(), self.states.accumulate():
            return self._executor.run(table[self.mesh.coordinate.pp], program, loss_of, weights)

    def evaluate(self, program: Program, num_microbatches: int) -> list[Any]:
        """Forward of every microbatch, without gradients. Collective over the replica; returns as `train` does."""
        table = forward_only(self.mesh.layout.pp, num_microbatches)
        gathered = nullcontext() if self.states is None else self.states.evaluate()
        with self.watchdog.step("evaluate"), self.streams.step(), torch.no_grad(), gathered:
            return self._executor.run(table[self.mesh.coordinate.pp], program, _no_loss, ())

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the run, for a checkpoint of the same layout. Collective over dp."""
        parameters = self.module.named_parameters() if self.states is None else self.states.full_parameters()
        gathered = self.mesh.layout.zero == 3  # a gathered value is there until the next is asked for
        return {
            "parameters": {name: value.detach().clone() if gathered else value.detach() for name, value in parameters},
            "buffers": dict(self.module.named_buffers()),
            "streams": self.streams.state_dict(),
            "states": None if self.states is None else self.states.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave on this rank: parameters with the optimizer states where there are any."""
        held, saved = dict(self.module.named_buffers()), dict(state["buffers"])
        if self.states is not None and state["states"] is not None:
            self.states.load_state_dict(state["states"])
        else:
            held.update(self.module.named_parameters())
            saved.update(state["parameters"])
        with torch.no_grad():
            for name, tensor in held.items():
                tensor.copy_(saved[name])
        self.streams.load_state_dict(state["streams"])


def broadcast_module(module: nn.Module, mesh: Mesh) -> None:
    """Give every rank the parameters and buffers of rank 0. Collective over the world.

    A script that draws its weights without a seed has other weights in every process.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if mesh.world.size > 1:
            dist.broadcast(tensor.data, src=0, group=mesh.world.group)


def _no_loss(output: Any) -> torch.Tensor:
    raise AssertionError("a forward-only table has no backward")
