"""The Lightning strategy: hooks that delegate to the parts that do the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn

from lightning_par.checkpoint import check_layout, load_checkpoint, load_rank_state, save_checkpoint
from lightning_par.engine import Engine
from lightning_par.gradients import clip_by_norm, clip_by_value, global_norm, sum_shared_gradients
from lightning_par.host.construction import check_init_word, configuring, guard_setup
from lightning_par.host.launcher import launcher_class
from lightning_par.host.loss_weight import LossWeight, read_loss_weight
from lightning_par.host.memory import check_memory_gib
from lightning_par.host.namespace import bind, root_in_use, worker_seeding
from lightning_par.host.plan_report import report_plan
from lightning_par.host.precision import check_device, precision_class, read_precision, read_scale
from lightning_par.host.preflight import (
    check_callbacks,
    check_checkpoints,
    check_optimization,
    check_split,
    check_trainable,
    leave_inference_mode,
    plan_from_trainer,
)
from lightning_par.host.steps import StepRunner
from lightning_par.host.watch import check_hang_seconds, watch_engine
from lightning_par.layout import Layout, parse_layout
from lightning_par.materialize import match_weights, materialize_attributes
from lightning_par.pipeline.tables import choose_schedule, splits_backward
from lightning_par.plan import Plan
from lightning_par.plan.compiled import read_backend
from lightning_par.plan.override import check_float8_word, check_recompute_word
from lightning_par.runtime.generator import share_generators
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.precision import FULL
from lightning_par.tensor import check_float8
from lightning_par.zero.config import overwritten
from lightning_par.zero.option import check_zero_options, read_zero_options
from lightning_par.zero.states import OptimizerStates

if TYPE_CHECKING:
    from pytorch_lightning.strategies import ParallelStrategy as Host
else:
    Host = object


class HybridParallelStrategy(Host):
    """Pipeline, tensor and ZeRO parallelism for an unmodified LightningModule.

    ``Trainer(strategy=HybridParallelStrategy("tp2_pp2_zero1"), accelerator="cpu", devices=8)``, with the Trainer of
    ``pytorch_lightning`` or of ``lightning.pytorch``.

    Args:
        layout: a layout word, such as ``tp2_pp2_zero1``, or a `Layout`. dp left out is what is left of the devices.
        plan: lines that win over what the trace says, see `lightning_par.plan.override`.
        recompute: what of the blocks' activations the backward computes again: ``none``, ``selective`` (what is cheap to make)
            or ``full`` (all but their inputs); ``auto`` chooses for as few blocks as fit the memory. A line of ``plan`` says it for
            single blocks.
        memory_gib: GiB that each rank may store, which is checked before the run and is what ``auto`` fits; by default ``auto``
            takes the memory of the GPU.
        offload_activations: whether what the blocks save for the backward waits in the memory of the host, see
            `lightning_par.offload`. A line of ``plan`` says it for single blocks.
        compile: whether torch.compile compiles the blocks: True, or the name of its backend.
        fp8: whether the linear layers of the blocks multiply in float8, and how they scale: ``tensorwise`` or ``rowwise``, see
            `lightning_par.tensor.float8`. Needs a GPU that has float8 units, torchao, and a bf16 precision.
        schedule: the pipeline schedule, one of `lightning_par.pipeline.schedules`, or ``auto``: made for the costs of the
            stages, first by their FLOPs, and after a few steps by their measured time. By default 1F1B, or interleaved where the
            layout has several stages on a rank.
        loss_weight: what names or counts the targets of a batch where parts of it have different numbers of them, see
            `lightning_par.host.loss_weight`; parts count by their samples without it.
        zero: options of ZeRO by name, see `lightning_par.zero.option.ZeroOptions`; the stage is in the layout.
        init: how the weights are made that ``configure_model`` builds, see `lightning_par.host.construction`.
        weights: a folder that transformers' ``save_pretrained`` wrote, or a safetensors file: each rank reads its shards of it,
            in the place of initial weights.
        timeout_seconds: how long a collective may wait for a rank before it is an error.
        hang_seconds: how long one forward or backward of a microbatch may stand still on a rank, when those before it were quick,
            before its stack is shown and the run ends; see `lightning_par.runtime.watchdog`. None for any time.
        print_plan: whether rank 0 prints the plan before the first step.

    Raises:
        LayoutError: the layout cannot be read; or, when the Trainer is made, does not fit its devices.
        ConfigurationError: the schedule or the word for ``recompute``, ``fp8`` or ``init`` or the backend for ``compile`` is
            unknown, ``loss_weight`` is no such thing, ``memory_gib`` is not positive, ``hang_seconds`` is too short, or an option
            in ``zero`` is unknown or not one of the layout.
    """

    root = ""  # the Lightning namespace, set by `bind`

    def __new__(cls, *args: Any, **kwargs: Any) -> HybridParallelStrategy:
        """Make a strategy of the Lightning namespace that the caller uses: their classes are disjoint."""
        mixin: Any = cls
        return object.__new__(mixin if cls.root else bind(mixin, root_in_use(sys._getframe(1))))

    def __init__(
        self,
        layout: str | Layout = "single",
        *,
        plan: Mapping[str, Any] | None = None,
        recompute: str = "none",
        memory_gib: float | None = None,
        offload_activations: bool = False,
        compile: bool | str = False,
        fp8: str | None = None,
        schedule: str | None = None,
        loss_weight: LossWeight | None = None,
        zero: Mapping[str, Any] | None = None,
        init: str = "exact",
        weights: str | Path | None = None,
        timeout_seconds: float = 600.0,
        hang_seconds: float | None = 20.0,
        print_plan: bool = True,
    ) -> None:
        super().__init__()
        self._typed = str(layout)
        self.schedule, self.layout = choose_schedule(schedule, parse_layout(layout) if isinstance(layout, str) else layout)
        check_recompute_word(recompute)
        check_memory_gib(memory_gib)
        check_hang_seconds(hang_seconds)
        self.zero_options = read_zero_options(zero)
        check_zero_options(self.zero_options, self.layout, self.schedule, splits_backward(self.schedule, self.layout))
        self.overrides, self._print_plan = dict(plan or {}), print_plan
        self.loss_weight, self.memory_gib = read_loss_weight(loss_weight), memory_gib
        self.init, self.weights = check_init_word(init), weights
        if compile:
            self.overrides["compile"] = read_backend(compile)
        if fp8 is not None:
            check_float8_word(fp8)
            self.overrides["fp8"] = fp8
        if recompute != "none":
            self.overrides["recompute"] = {"*": recompute, **(self.overrides.get("recompute") or {})}
        self._timeout, self._hang_seconds = timedelta(seconds=timeout_seconds), hang_seconds
        if offload_activations:
            self.overrides["offload_activations"] = {"*": True, **(self.overrides.get("offload_activations") or {})}
        self._num_nodes = 1
        self._plan: Plan | None = None
        self._mesh: Mesh | None = None
        self._engine: Engine | None = None
        self._steps: StepRunner | None = None
        self._reduced: dict[int, bool] = {}  # optimizers whose gradients are reduced, by position; whether they have overflowed
        self.grad_norm: torch.Tensor | None = None

    # ------------------------------------------------------------------ devices and ranks

    @property
    def num_nodes(self) -> int:
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, count: int) -> None:
        self._num_nodes = count

    @property
    def num_processes(self) -> int:
        return len(self.parallel_devices or ())

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def mesh(self) -> Mesh:
        """This rank's axes; there once the Trainer has started."""
        if self._mesh is None:
            raise RuntimeError("the mesh exists once trainer.fit, validate, test or predict has started")
        return self._mesh

    @property
    def plan(self) -> Plan:
        """All decisions of the run; there once the Trainer has started."""
        if self._plan is None:
            raise RuntimeError("the plan exists once trainer.fit, validate, test or predict has started")
        return self._plan

    @property
    def dp_rank(self) -> int:
        """Which replica this rank belongs to; what a dataset or sampler is sharded by."""
        return self.layout.coordinate_of(self.global_rank).dp

    @property
    def dp_size(self) -> int:
        """Replicas."""
        return self.layout.dp or 1

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning puts its sampler in the place of the user's: with one replica the data keep their order."""
        return self.dp_size > 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All ranks of a replica read the same samples."""
        return {"num_replicas": self.dp_size, "rank": self.dp_rank}

    def set_world_ranks(self) -> None:
        """Tell Lightning's environment the world; fill in dp. Called by the Trainer before the launcher is made."""
        world_size = self._num_nodes * self.num_processes
        self.layout = self.layout.resolve(world_size, self._typed)
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(world_size)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]
        if self.layout.zero and self.dp_size == 1:
            rank_zero_warn(f"parallel={self._typed}: zero{self.layout.zero} has nothing to shard with dp 1 and is ignored")

    def _configure_launcher(self) -> None:
        self._launcher = launcher_class(self.root)(
            self.cluster_environment, self.num_processes, self._num_nodes, layout=self.layout, preflight=self._preflight
        )

    def _preflight(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Everything that can be found wrong without other ranks, before they are started; the plan, on rank 0."""
        check_device(self.precision, self.root_device)
        check_callbacks(trainer)
        leave_inference_mode(trainer)
        if self.overrides.get("fp8") is not None:
            check_float8(self.overrides["fp8"], self.root_device, self.precision.name)
        module = args[0] if args and args[0] is not None else trainer.lightning_module
        check_checkpoints([*args, *kwargs.values()], self.layout)
        materialize_attributes(module)
        engine = check_split(module, self.layout, self.precision)
        if engine is not None:
            self._engine, self._mesh, self._plan = engine, engine.mesh, engine.plan
        elif self.global_rank == 0:
            self._plan = plan_from_trainer(
                trainer, self.layout, self.overrides, trainer.state.fn.value, module, *args[1:], **kwargs
            )
        if engine is None:
            guard_setup(module)

    # ------------------------------------------------------------------ setup

    def setup_environment(self) -> None:
        super().setup_environment()
        if not dist.is_initialized():
            environment = self.cluster_environment
            assert environment is not None
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
            backend = "nccl" if self.root_device.type == "cuda" else "gloo"
            dist.init_process_group(backend, rank=self.global_rank, world_size=self.world_size, timeout=self._timeout)
        if self._mesh is None:
            self._mesh = Mesh(self.layout, self._timeout)

    def setup(self, trainer: Any) -> None:
        """Install the plan on the module, then make the optimizers over what this rank holds."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self.lightning_module
        if self._engine is None or self._engine.module is not module:
            self._install(module)
            folder = trainer.log_dir if trainer.loggers else None  # every rank asks: the answer is broadcast
            if self.is_global_zero:
                report_plan(self.plan, self.schedule, folder, self._print_plan)
        watch_engine(self.engine, self._launcher, self._hang_seconds)
        self._steps = StepRunner(self.engine, self.loss_weight)
        share_generators(self.mesh.replica)
        self.engine.loss_scale = read_scale(self._chosen_precision) if trainer.state.fn == "fit" else None
        if trainer.state.fn == "fit":
            module.__dict__["optimizer_zero_grad"] = _do_nothing  # gradients are there before Lightning would clear them
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def tensor_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[None]:
        """Around ``configure_model``: what it builds is built on the CPU, and moved as shards."""
        return nullcontext()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Around ``configure_model``: what it builds has no memory for weights yet."""
        module = self.lightning_module
        assert module is not None
        with configuring(module, self.init):
            yield

    def _install(self, module: Any) -> None:
        materialize_attributes(module)
        plans: list[Any] = [self._plan, torch.initial_seed()]
        dist.broadcast_object_list(plans, src=0, group=self.mesh.world.group)
        self._plan = plans[0]
        weights = None if self.weights is None else match_weights(module, self.weights)
        self._engine = Engine(module, self.plan, self.mesh, self.root_device, self.schedule, plans[1], self.precision, weights)

    def setup_optimizers(self, trainer: Any) -> None:
        try:
            super().setup_optimizers(trainer)
        except ValueError as error:
            check_trainable(self.lightning_module, self.mesh.coordinate, error)
            raise
        check_optimization(self.lightning_module, self.optimizers, self.layout)
        for warning in overwritten(self.layout.zero, self.zero_options) if self.layout.zero else ():
            rank_zero_warn(warning)
        self.engine.own_states(self.optimizers, self.zero_options)

    def process_dataloader(self, dataloader: Any) -> Any:
        """Seed a loader's workers by replica, not by rank: the ranks of a replica augment alike."""
        if os.environ.get("PL_SEED_WORKERS") == "1" and getattr(dataloader, "worker_init_fn", self) is None:
            dataloader.worker_init_fn = partial(worker_seeding(self.root), rank=self.dp_rank)
        return dataloader

    def model_to_device(self) -> None:
        """The engine moves this rank's shards when it installs them."""

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    @property
    def states(self) -> OptimizerStates:
        """The owner of the optimizer states; there while fitting."""
        assert self.engine.states is not None
        return self.engine.states

    @property
    def precision_plugin(self) -> Any:
        """Ours; it carries out what Lightning's says, which is made from ``Trainer(precision=...)``."""
        return self._own_precision

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        self.precision = FULL if plugin is None else read_precision(plugin)
        self._chosen_precision = plugin
        self._precision_plugin = None  # Lightning would take anything here for the user's plugin and drop precision=
        self._own_precision = precision_class(self.root)(self, self.precision)

    # ------------------------------------------------------------------ steps

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of one batch through all stages; the mean loss, equal on every rank, without a graph."""
        module, steps = self.lightning_module, self._running
        if not module.automatic_optimization:
            return steps.run_whole(batch, args, kwargs)
        trainer = module.trainer
        batch_idx = args[0] if args else 0
        if batch_idx % trainer.accumulate_grad_batches == 0:
            type(module).optimizer_zero_grad(module, trainer.current_epoch, batch_idx, self.optimizers[0])
            self.states.zero_grad()
        return steps.train(batch, args, kwargs, 1 / trainer.accumulate_grad_batches)

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        return self._running.evaluate("validation_step", batch, args, kwargs)

    def test_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        return self._running.evaluate("test_step", batch, args, kwargs)

    def predict_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's ``predict_step`` through all stages; the whole batch's output on every rank of the replica."""
        return self._running.evaluate("predict_step", batch, args, kwargs)

    def on_predict_end(self) -> None:
        self._running.end_predictions()

    @property
    def _running(self) -> StepRunner:
        assert self._steps is not None, "steps run inside trainer.fit, validate, test or predict"
        return self._steps

    # ------------------------------------------------------------------ optimization

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The hooks around a backward; the backward itself has run, except in manual optimization."""
        module = self.lightning_module
        if not module.automatic_optimization:
            scale = self.engine.loss_scale
            scaled = closure_loss if scale is None else closure_loss * scale.scale
            return super().backward(scaled, optimizer, *args, **kwargs)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        return self.precision_plugin.post_backward(closure_loss, module)

    def reduce_gradients(self, optimizer: Any) -> None:
        """Sum shared gradients, average over dp, take the loss scale out; once for each step of an optimizer.

        Collective over the world.
        """
        position = self._position_of(optimizer)
        if position not in self._reduced:
            chosen = self.optimizers[position]
            sum_shared_gradients([p for group in chosen.param_groups for p in group["params"]], self.mesh)
            only = chosen if len(self.optimizers) > 1 else None
            self.states.reduce(only)
            scale = self.engine.loss_scale
            self._reduced[position] = scale is not None and scale.unscale(self.states, self.mesh, only)

    def clip_gradients(self, optimizer: Any, value: float, algorithm: str) -> None:
        """Clip the reduced gradients of the whole model, by norm or by value. Collective over the world."""
        self.reduce_gradients(optimizer)
        chosen = optimizer if len(self.optimizers) > 1 else None
        if algorithm == "value":
            clip_by_value(self.states, value, chosen)
        else:
            self.grad_norm = global_norm(self.states, self.mesh, chosen)
            clip_by_norm(self.states, value, self.grad_norm, chosen)

    def step_optimizer(self, optimizer: Any) -> None:
        """Step with the reduced gradients; where they have overflowed, forget them."""
        position = self._position_of(optimizer)
        only = self.optimizers[position] if len(self.optimizers) > 1 else None
        has_overflowed = self._reduced.pop(position)
        if has_overflowed:
            self.states.zero_grad(only)
        else:
            self.states.step(only)
        if self.engine.loss_scale is not None:
            self.engine.loss_scale.update(has_overflowed)

    def _position_of(self, optimizer: Any) -> int:
        """Which of the optimizers is meant; Lightning hands out wrappers, which share the groups."""
        return next(index for index, own in enumerate(self.optimizers) if own.param_groups is optimizer.param_groups)

    # ------------------------------------------------------------------ collectives for Lightning

    def barrier(self, name: str | None = None) -> None:
        if dist.is_initialized():
            devices = [self.root_device.index or 0] if self.root_device.type == "cuda" else None
            dist.barrier(device_ids=devices)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not dist.is_initialized():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=src)
        return box[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over all ranks. A mean over all ranks is the mean over replicas, as tp and pp ranks hold equal values."""
        if not isinstance(tensor, torch.Tensor) or not dist.is_initialized():
            return tensor
        total = tensor.clone().to(self.root_device)
        is_mean = isinstance(reduce_op, str) and reduce_op.lower() in ("mean", "avg")
        operation = dist.ReduceOp.SUM if isinstance(reduce_op, str) or reduce_op is None else reduce_op
        total = total.double() if is_mean and not total.is_floating_point() else total
        dist.all_reduce(total, op=operation, group=group)
        return total / dist.get_world_size(group) if is_mean else total

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        count = int(self.reduce(torch.tensor(int(decision)), reduce_op="sum"))
        return count == self.world_size if all else count > 0

    # ------------------------------------------------------------------ checkpoints

    restore_checkpoint_after_setup = True  # a rank reads its own shards, which exist after setup
    lightning_restore_optimizer = False  # optimizer states are read with the shards

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: each rank's shards are written by `save_checkpoint`."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing, as for the weights."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder: what Lightning gives, once, and every rank's shards. Collective over the world."""
        filepath = self.broadcast(str(filepath))
        save_checkpoint(Path(filepath), checkpoint, self.engine.state_dict(), self.mesh)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read what Lightning gave to `save_checkpoint`. The shards follow in `load_model_state_dict`."""
        self._loading = Path(checkpoint_path)
        check_layout(self._loading, self.layout)
        return load_checkpoint(self._loading, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self.engine.load_state_dict(load_rank_state(self._loading, self.mesh))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The optimizer states came with the shards."""

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(filepath)

    # ------------------------------------------------------------------ teardown

    def teardown(self) -> None:
        module = self.lightning_module
        if module is not None:
            for name in ("optimizer_zero_grad", "setup"):
                module.__dict__.pop(name, None)
        if self._steps is not None:
            self.engine.watchdog.stop()
            self._steps.close()
            self._steps = None
        for part in (self.precision_plugin, self.cluster_environment, self.accelerator, self.checkpoint_io):
            if part is not None:  # the base class would also move the module away from its device
                part.teardown()


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None
