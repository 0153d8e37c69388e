"""One rank's part of a plan in motion: the installed module, its schedule, its streams of random numbers.

Knows nothing of Lightning: it is given a program that runs the user's step on one microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_par.checkpoint import (
    Checkpoint,
    RankSource,
    Share,
    add_buffers,
    add_parameters,
    check_optimizers,
    find_configs,
    member_names,
    name_numbers,
    read_buffers,
    weights_of,
)
from lightning_par.guard.search import Search
from lightning_par.install import install
from lightning_par.loss_scale import LossScale
from lightning_par.materialize import LateValues, Weights, is_deferred, persistent_buffers, share_records
from lightning_par.pipeline.action import without_split
from lightning_par.pipeline.executor import Executor, Hooks, Observer
from lightning_par.pipeline.lockstep import Lockstep
from lightning_par.pipeline.measure import CostMeter
from lightning_par.pipeline.schedules import AUTO, default_schedule
from lightning_par.pipeline.simulate import Costs
from lightning_par.pipeline.tables import Tables, splits_backward
from lightning_par.pipeline.transport import Transport
from lightning_par.plan import Plan
from lightning_par.runtime.deferral import DeferredGradients
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.precision import FULL, Precision
from lightning_par.runtime.streams import MicrobatchStreams
from lightning_par.runtime.watchdog import Watchdog
from lightning_par.zero.held import WEIGHT, fill_tensor
from lightning_par.zero.option import ZeroOptions
from lightning_par.zero.partitioned import DeepSpeedStates
from lightning_par.zero.replicated import ReplicatedStates
from lightning_par.zero.states import OptimizerStates

Program = Callable[[int], Any]
METERED_STEPS = range(3, 6)  # calls of `Engine.train`; the first ones are slower than the rest


class Engine:
    """Runs the steps of an installed module. Every rank of the mesh makes the same calls.

    A module is installed once; its engine serves every Trainer that comes after.

    Attributes:
        plan: all decisions.
        mesh: this rank's axes.
        module: the user's module, installed in place.
        device: where it is.
        streams: random numbers.
        precision: in which the steps are to run; parameters are cast to it.
        states: the owner of the optimizer states; None until something is trained.
        loss_scale: factor of the loss in the backward; None for none.
        late: parameters that get their memory when stage 3 partitions them.
        watchdog: an observer that finds out whether this rank hangs, once it is started.
    """

    _engines: ClassVar[WeakKeyDictionary[nn.Module, Engine]] = WeakKeyDictionary()

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        mesh: Mesh,
        device: torch.device,
        schedule: str | None = None,
        seed: int = 0,
        precision: Precision = FULL,
        weights: Weights | None = None,
        late: LateValues | None = None,
    ) -> None:
        self.module, self.plan, self.mesh, self.device, self.precision = module, plan, mesh, device, precision
        share_records(module, mesh.world)
        broadcast_module(module, mesh)
        for holders in sorted({parameter.spec.stages for parameter in plan.parameters if len(parameter.spec.stages) > 1}):
            mesh.tied(holders)  # every rank makes every group, whether it holds such a weight or not
        for count in sorted({count for layer in plan.layers for count in layer.copies if count > 1}):
            mesh.copies(count)
        layout, pp = plan.layout, mesh.coordinate.pp
        is_ordered = device.type == "cuda"  # by NCCL; over gloo messages have tags
        self.tables = Tables(schedule or default_schedule(layout.vp), layout, traced_costs(plan), is_ordered)
        deferred = DeferredGradients()
        splits = splits_backward(self.tables.schedule, layout)
        stages = install(module, plan, pp, mesh.tp, device, deferred if splits else None, weights, precision, late)
        module.to(device)
        self.streams = MicrobatchStreams(seed, mesh.coordinate.dp, device)
        self._hooks = Hooks(before_forward=self.streams.begin, at_entrance=self.streams.enter_stage)
        transport = Transport(layout, mesh.activations, mesh.gradients, device)
        self._executor = Executor(stages, transport, self._hooks, deferred)
        self._lockstep = Lockstep(module, stages, transport, mesh.pp) if layout.pp > 1 else None
        self._meter = CostMeter(layout.num_stages, device) if self.tables.schedule == AUTO and layout.pp > 1 else None
        self._num_trained = 0
        self.watchdog = Watchdog()
        self.states: OptimizerStates | None = None
        self.loss_scale: LossScale | None = None
        self.late = late or LateValues()
        Engine._engines[module] = self

    @classmethod
    def of(cls, module: nn.Module) -> Engine | None:
        """The engine of an installed module."""
        return cls._engines.get(module)

    def own_states(self, optimizers: Sequence[Optimizer], options: ZeroOptions | None = None) -> OptimizerStates:
        """Give the optimizers' states an owner: every replica, or DeepSpeed. Collective over the world.

        Args:
            optimizers: over the parameters of this rank.
            options: how DeepSpeed is to do it.
        """
        layout = self.mesh.layout
        if self.states is not None:
            self.states.dissolve()
        if layout.zero and self.mesh.dp.size > 1:
            self.states = DeepSpeedStates(
                self.module,
                optimizers,
                layout.zero,
                self.mesh,
                options,
                has_masters=self.precision.has_masters,
                units=self._blocks(),
                fill=self.late.fill if self.late else None,
            )
        else:
            self.states = ReplicatedStates(self.module, optimizers, self.mesh.dp, self.precision.has_masters)
        self._hooks.after_forward, self._hooks.after_backward = self.states.after_forward, self.states.after_backward
        return self.states

    def _blocks(self) -> list[nn.Module]:
        """Those of this rank."""
        chain, held = self.plan.chain, self.plan.blocks_at(self.mesh.coordinate.pp)
        return [] if chain is None else [self.module.get_submodule(chain.blocks[index]) for index in held]

    @property
    def runs_last_stage(self) -> bool:
        """Whether the stage whose step runs on this rank right now is the pipeline's last."""
        stage = self._executor.running
        return self.mesh.is_last_stage if stage is None else stage == self.plan.layout.num_stages - 1

    @property
    def observers(self) -> list[Observer]:
        """Who sees the actions of this rank, as a clock does."""
        return self._executor.observers

    @property
    def sent_bytes(self) -> dict[str, float]:
        """What this rank has sent over each axis since it has had one: parameters, gradients and what is between layers."""
        sent = self.mesh.sent_bytes
        sent["pp"] += self._executor.sent_bytes
        sent["dp"] += 0.0 if self.states is None else self.states.sent_bytes
        return sent

    @property
    def on_the_way(self) -> list[torch.Tensor]:
        """What this rank holds of messages between stages."""
        return self._executor.on_the_way

    def train(
        self,
        program: Program,
        weights: Sequence[float | torch.Tensor],
        loss_of: Callable[[Any], torch.Tensor],
        shapes: Sequence[Hashable] = (),
    ) -> list[Any]:
        """Forward and backward of every microbatch; gradients add up in ``p.grad``. Collective over the replica.

        Args:
            program: runs the user's step on the microbatch of an index.
            weights: factor of each microbatch's loss in the backward, without the loss scale; read where the last stage runs.
            loss_of: the loss in what the step returned.
            shapes: of each microbatch, the step and the shapes of its tensors; empty where they are not known.

        Returns:
            What the step returned for each microbatch, on the ranks of the last stage; elsewhere an empty list.
        """
        row = self.tables.row(self.mesh.coordinate.pp, len(weights), trains=True)
        assert self.states is not None, "training needs an owner of the optimizer states"
        if self.loss_scale is not None:
            weights = [self.loss_scale.scale * weight for weight in weights]
        with self.watchdog.step("train"), self.streams.step(), self.states.accumulate(), self._metered():
            return self._executor.run(row, program, loss_of, weights, self._static(shapes))

    def search(
        self,
        search: Search,
        program: Program,
        weights: Sequence[float | torch.Tensor],
        loss_of: Callable[[Any], torch.Tensor],
        shapes: Sequence[Hashable] = (),
    ) -> None:
        """`train` once more, under the eyes of ``search``; for a step that is not to be taken. Collective over the replica."""
        row, enter = without_split(self.tables.row(self.mesh.coordinate.pp, len(weights), trains=True)), self._hooks.at_entrance

        def at_entrance(microbatch: int, stage: int) -> None:
            enter(microbatch, stage)
            search.enter()

        def watched(index: int) -> Any:
            output = program(index)
            search.end_step(loss_of(output))
            return output

        assert self.states is not None, "training needs an owner of the optimizer states"
        self._hooks.at_entrance = at_entrance
        self.observers.append(search)
        try:
            with self.watchdog.step("train"), self.streams.step(), self.states.accumulate(), search.watching():
                self._executor.run(row, watched, loss_of, weights, self._static(shapes))
        finally:
            self.observers.remove(search)
            self._hooks.at_entrance = enter

    def evaluate(self, program: Program, num_microbatches: int, shapes: Sequence[Hashable] = ()) -> list[Any]:
        """Forward of every microbatch, without gradients. Collective over the replica; returns as `train` does."""
        row = self.tables.row(self.mesh.coordinate.pp, num_microbatches, trains=False)
        gathered = nullcontext() if self.states is None else self.states.evaluate()
        with self.watchdog.step("evaluate"), self.streams.step(trains=False), torch.no_grad(), gathered:
            return self._executor.run(row, program, _no_loss, (), self._static(shapes))

    def evaluate_in_lockstep(self, program: Callable[[], Any]) -> tuple[Any, int]:
        """A whole step, without gradients, that may call its blocks again and again; see `lightning_par.pipeline.lockstep`.

        Collective over the replica.

        Returns:
            What the step returned, on every rank; and how often it went through its blocks.
        """
        assert self._lockstep is not None, "one rank runs such a step alone"
        gathered = nullcontext() if self.states is None else self.states.evaluate()
        with self.streams.step(trains=False), torch.no_grad(), gathered:
            self.streams.begin(0)
            return self._lockstep.run(program), self._lockstep.num_passes

    @contextmanager
    def _metered(self) -> Iterator[None]:
        """Around a training step: some of the first ones tell what each stage costs, where the schedule is made of that.

        Collective over the world after the last of them.
        """
        self._num_trained += 1
        if self._meter is None or self._num_trained not in METERED_STEPS:
            yield
            return
        self.observers.append(self._meter)
        yield
        self.observers.remove(self._meter)
        if self._num_trained == METERED_STEPS[-1]:
            self.tables.costs, self._meter = self._meter.costs(self.mesh.world), None

    def _static(self, shapes: Sequence[Hashable]) -> Sequence[Hashable]:
        """The shapes that a step's follow from; none where code reads values, which may change them."""
        return shapes if self.plan.chain is not None and self.plan.chain.is_static else ()

    def share(self, has_states: bool = True) -> Share:
        """What this rank writes of parameters, buffers and optimizer states; live. Collective over the world.

        Args:
            has_states: whether optimizer states are written.
        """
        held = weights_of(self.module) if self.states is None else self.states.held()
        share = Share()
        add_parameters(share, self.plan.parameters, (each for each in held if has_states or each.key == WEIGHT), self.mesh)
        add_buffers(share, persistent_buffers(self.module), self.mesh)
        return share

    def run_state(self, has_states: bool = True) -> dict[str, Any]:
        """What there is to go on from beside tensors, on this rank; all but ``numbers`` and ``members`` is equal on all ranks."""
        state: dict[str, Any] = {"streams": self.streams.state_dict(), "precision": self.precision.name}
        state["configs"] = find_configs(self.module)
        if self.loss_scale is not None:
            state["loss_scale"] = self.loss_scale.state_dict()
        if self.states is not None and has_states:
            state["optimizers"] = [f"{type(each).__module__}.{type(each).__qualname__}" for each in self.states.optimizers]
            state["groups"] = self.states.groups()
            state["members"] = member_names(self.states.optimizers)
            state["numbers"] = name_numbers(self.states.numbers(), self.mesh.tp)
        return state

    def restore(self, checkpoint: Checkpoint, run: Mapping[str, Any], is_strict: bool = True) -> None:
        """Take over what a checkpoint of any layout has. Collective over dp.

        Args:
            checkpoint: the checkpoint.
            run: what `run_state` gave, with the numbers of all ranks.
            is_strict: whether it must have every parameter and no other.

        Raises:
            CheckpointError: it is of another module or optimizer, or damaged.
        """
        if is_strict:
            shapes = {parameter.spec.name: parameter.spec.shape for parameter in self.plan.parameters}
            checkpoint.check_fit(shapes, type(self.module).__name__)
        source = RankSource(checkpoint, run.get("numbers", {}), self.mesh.tp, is_strict)
        if self.states is None:
            for parameter in self.module.parameters():
                fill_tensor(source, parameter, WEIGHT, parameter.data)
        else:
            check_optimizers(run.get("optimizers"), self.states.optimizers)
            self.states.refill(source)
            if "groups" in run:
                self.states.refill_groups(run["groups"])
        read_buffers(checkpoint, persistent_buffers(self.module), self.mesh.coordinate.dp)
        if "streams" in run:  # none of a checkpoint that another program wrote
            self.streams.load_state_dict(run["streams"])
        if self.loss_scale is not None and "loss_scale" in run:  # none was saved in another precision
            self.loss_scale.load_state_dict(run["loss_scale"])


def traced_costs(plan: Plan) -> Costs:
    """Time of each stage in units of forward FLOPs: a backward has the gradients of inputs and of weights, a product each."""
    flops = [float(stage.flops) for stage in plan.stages]
    return Costs(forward=flops, input_gradient=flops, weight_gradient=flops, transfer=0.0)


def broadcast_module(module: nn.Module, mesh: Mesh) -> None:
    """Give every rank the parameters and buffers of rank 0 that have memory. Collective over the world.

    A script that draws its weights without a seed has other weights in every process.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if mesh.world.size > 1 and not is_deferred(tensor):
            dist.broadcast(tensor.data, src=0, group=mesh.world.group)


def _no_loss(output: Any) -> torch.Tensor:
    raise AssertionError("a forward-only table has no backward")
