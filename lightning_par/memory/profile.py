"""What one microbatch stores on each stage, from a run of its forward and backward on fake tensors.

Each stage is installed as on its rank, on a copy of the module without memory, and runs by the same executor: recomputation,
sequence parallelism, what is received and the notes of deferred weight gradients are in it because they happen. tp axes send
nothing there and give tensors of the right sizes. The same rank runs on real tensors where it is to be timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_par.install import install
from lightning_par.memory.living import LivingTensors
from lightning_par.memory.matter import Fakes, Matter
from lightning_par.pipeline.action import Action, Kind
from lightning_par.pipeline.executor import Executor
from lightning_par.pipeline.transport import Like, Transport
from lightning_par.plan import Plan
from lightning_par.private.saved import Part, cast_parameter, saving
from lightning_par.private.torch import FakeTensorMode, StorageWeakRef, place_of
from lightning_par.runtime.axis import Axis
from lightning_par.runtime.deferral import DeferredGradients
from lightning_par.runtime.generator import generators_put_back
from lightning_par.runtime.imagined import ImaginedAxis
from lightning_par.runtime.nested import map_tensors, tensors_in
from lightning_par.runtime.precision import FULL, Precision
from lightning_par.trace.tracer import silent_copy
from lightning_par.zero.bucket import gradient_dtype
from lightning_par.zero.masters import accumulate_in_float32

Loss = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class ActionMemory:
    """What an action does to the bytes that one microbatch has on one stage.

    Attributes:
        before, after: what is stored when it begins and ends, parameters, gradients and the batch not counted.
        peak: the most at once while it runs, what operations give each other included.
    """

    before: int
    after: int
    peak: int


StageMemory = dict[Kind, ActionMemory]  # of one microbatch, by action


def profile_stages(
    module: nn.Module,
    batch: Any,
    plan: Plan,
    loss_of: Loss,
    splits_backward: bool,
    precision: Precision = FULL,
    step: str = "training_step",
) -> list[StageMemory]:
    """What one microbatch stores on each stage. One process, no process group; the module is not changed.

    Args:
        module: the user's module.
        batch: one microbatch, as large as any.
        plan: all decisions.
        loss_of: the loss in what the step returns.
        splits_backward: whether the schedule computes weight gradients apart.
        precision: of the run.
        step: the hook that trains.

    Raises:
        Exception: whatever the step raises on fake tensors; see `lightning_par.private.torch.is_data_dependent`.
    """
    layout, sent = plan.layout, dict[Action, list[Like]]()
    with generators_put_back(), torch.compiler.set_stance("force_eager"), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        made = (module, batch, plan), Fakes(fake, precision), sent, loss_of, splits_backward, precision, step
        ranks = [ImaginedRank(pp, ImaginedAxis("tp", layout.tp, 0), *made) for pp in range(layout.pp)]
        if not (plan.chain is None or plan.chain.keeps_shape) or any(plan.boundaries):
            for stage in range(layout.num_stages):  # what is sent says what the next one receives
                ranks[layout.pp_of(stage)].run(Action("F", stage, 0))
        found: dict[int, StageMemory] = {}
        for rank, its in enumerate(ranks):
            for stage in layout.stages_of(rank):
                found[stage] = its.profile(stage)
    return [found[stage] for stage in range(layout.num_stages)]


class ImaginedRank:
    """One pp coordinate of a run, alone.

    Args:
        pp: the coordinate.
        tp: the axis of its split layers, which talks to nobody.
        run: the user's module, a microbatch, and all decisions.
        matter: makes its tensors.
        sent: what stages have sent, filled by those that run.
        loss_of: the loss in what the step returns.
        splits_backward: whether weight gradients are computed apart.
        precision: of the run.
        step: the hook that trains.

    Attributes:
        batch: the microbatch of the next `run`.
        observers: of the actions.
        shared_bytes: of what the last `profile` has found that a stage makes before it receives, as masks, and keeps: as much, and
            no more, for any number of blocks.
    """

    def __init__(
        self,
        pp: int,
        tp: Axis,
        run: tuple[nn.Module, Any, Plan],
        matter: Matter,
        sent: dict[Action, list[Like]],
        loss_of: Loss,
        splits_backward: bool,
        precision: Precision,
        step: str,
    ) -> None:
        module, batch, plan = run
        twin = silent_copy(module, matter.state)
        self.batch = map_tensors(matter.given, batch)
        deferred = DeferredGradients()
        stages = install(twin, plan, pp, tp, matter.device, deferred if splits_backward else None)
        matter.settle(twin)
        twin.train()
        accumulate_in_float32(twin.parameters())
        for parameter in twin.parameters():  # as they are from the second microbatch on
            dtype = gradient_dtype(parameter)
            parameter.grad = torch.zeros_like(parameter, dtype=dtype) if parameter.requires_grad else None
        self._executor = Executor(stages, _Imagined(sent, matter), None, deferred)
        self.observers = self._executor.observers
        self._device = matter.device.type
        self._twin, self._step, self._loss_of, self._precision = twin, step, loss_of, precision
        recasts = plan.layout.zero == 3 and plan.layout.dp != 1  # `lightning_par.private.deepspeed.gathered`
        self._saving: Callable[[], AbstractContextManager[object]] = partial(saving, _as_part) if recasts else nullcontext
        self.shared_bytes = 0
        self._kinds: tuple[tuple[Kind, ...], ...] = (("F", "B"), ("F", "I", "W")) if splits_backward else (("F", "B"),)

    def run(self, *row: Action) -> None:
        """Run some actions."""
        step: Any = getattr(self._twin, self._step)

        def program(index: int) -> Any:
            with self._precision.computing(self._device), self._saving():
                return step(self.batch, 0)

        self._executor.run(row, program, self._loss_of, [1.0])

    def profile(self, stage: int) -> StageMemory:
        """What each kind of action does, every way to do a backward tried."""
        found: StageMemory = {}
        for kinds in self._kinds:
            gradients = [parameter.grad for parameter in self._twin.parameters() if parameter.grad is not None]
            state = [*self._twin.parameters(), *self._twin.buffers(), *gradients, *tensors_in(self.batch)]
            living = LivingTensors(state)
            watch = _Watch(living)
            self.observers.append(watch)
            try:
                with living:
                    self.run(*(Action(kind, stage, 0) for kind in kinds))
            finally:
                self.observers.remove(watch)
            found.update(zip(kinds, watch.seen, strict=True))
            self.shared_bytes = watch.shared_bytes
        return found


def _as_part(tensor: torch.Tensor) -> Part | None:
    """What is made again from a weight."""
    parameter, place = cast_parameter(tensor), place_of(tensor)
    return None if parameter is None or place is None else Part(lambda: parameter.data, *place[1:], tensor.dtype)


class _Watch:
    """An observer that reads a `LivingTensors` around each action."""

    def __init__(self, living: LivingTensors) -> None:
        self._living, self._before, self._action = living, 0, Action("F", 0, 0)
        self._made: list[tuple[StorageWeakRef, int]] = []
        self.seen: list[ActionMemory] = []
        self.shared_bytes = 0

    def begin(self, action: Action) -> None:
        self._living.forget_peak()
        self._before, self._action = self._living.num_bytes(), action

    def wait(self) -> None:
        if self._action.kind == "F":
            self._made = self._living.alive()

    def arrive(self) -> None:
        """It is there."""

    def end(self) -> None:
        after = self._living.num_bytes()
        if self._action.kind == "F":
            self.shared_bytes = sum(size for reference, size in self._made if not reference.expired())
        self.seen.append(ActionMemory(self._before, after, max(after, self._living.peak_bytes)))


class _Imagined(Transport):
    """Gives tensors of the shapes that were sent, or that the receiver expects where nothing was."""

    def __init__(self, sent: dict[Action, list[Like]], matter: Matter) -> None:
        self._sent, self._matter = sent, matter

    def is_remote(self, message: Action) -> bool:
        return False

    def send(self, message: Action, tensors: Sequence[torch.Tensor], with_header: bool = False) -> None:
        self._sent[message] = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]

    def receive(self, message: Action, likes: Sequence[Like]) -> list[torch.Tensor]:
        return [self._matter.received(like) for like in self._sent.get(message, likes)]

    def flush(self) -> None:
        """Nothing travels."""
