"""The Lightning strategy: hooks that delegate to the parts that do the work."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_par.engine import Engine
from lightning_par.host.anomaly import check_anomaly_word
from lightning_par.host.check import check_optimization, check_run, check_split, check_trainable
from lightning_par.host.construction import check_init_word, configuring, guard_setup
from lightning_par.host.data import DataResumption
from lightning_par.host.launch.launcher import launcher_class
from lightning_par.host.loss_weight import LossWeight, read_loss_weight
from lightning_par.host.memory import check_memory_gib
from lightning_par.host.monitor import monitor_training
from lightning_par.host.namespace import bind, root_in_use
from lightning_par.host.option import Options, check_drift_guard, check_max_restarts, read_overrides
from lightning_par.host.plan_report import report_plan
from lightning_par.host.planned import PlannedStrategy
from lightning_par.host.precision import precision_class, read_precision, read_scale
from lightning_par.host.preflight import leave_inference_mode, plan_from_trainer
from lightning_par.host.steps import StepRunner
from lightning_par.host.stop import stop_politely
from lightning_par.host.update import Updates
from lightning_par.host.watch import check_hang_seconds, watch_engine
from lightning_par.layout import Layout, parse_layout
from lightning_par.materialize import LateValues, match_weights, materialize_attributes
from lightning_par.pipeline.tables import choose_schedule, splits_backward
from lightning_par.plan import Plan
from lightning_par.runtime.generator import share_generators
from lightning_par.runtime.precision import FULL
from lightning_par.zero.config import overwritten
from lightning_par.zero.option import check_zero_options, partitions_late, read_zero_options
from lightning_par.zero.states import OptimizerStates


class HybridParallelStrategy(PlannedStrategy):
    """Pipeline, tensor and ZeRO parallelism for an unmodified LightningModule.

    ``Trainer(strategy=HybridParallelStrategy("tp2_pp2_zero1"), accelerator="cpu", devices=8)``, with the Trainer of
    ``pytorch_lightning`` or of ``lightning.pytorch``.

    Args:
        layout: a layout word, such as ``tp2_pp2_zero1``, or a `Layout`. dp left out is what is left of the devices; ``auto`` is the
            layout that the planner finds quickest for them, see `lightning_par.host.auto`.
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
        async_save: whether checkpoints are written in the background, from a copy in the memory of the host.
        timeout_seconds: how long a collective may wait for a rank before it is an error.
        hang_seconds: how long one forward or backward of a microbatch may stand still on a rank, when those before it were quick,
            before its stack is shown and the run ends; see `lightning_par.runtime.watchdog`. None for any time.
        detect_anomaly: ``first``: a loss or clipped gradient that is infinite or undefined ends the run before the step, and the
            step is run again to name the first module and rank where that was; see `lightning_par.host.anomaly`. None to go on.
        drift_guard: every so many steps the ranks compare the bits of what they hold in common, and a difference ends the run; see
            `lightning_par.guard.drift`. 0 for never.
        print_plan: whether rank 0 prints the plan before the first step.
        max_restarts: how often all ranks are started again when one has failed, to go on from the newest good checkpoint of the
            run, see `lightning_par.host.launch.supervisor`. Under torchrun its own ``--max-restarts`` says it.
        audit: whether a training of 10 seconds or more ends with its step time and memory beside their forecast, see
            `lightning_par.host.audit`.
        monitor: whether a training has a `lightning_par.Monitor` where the Trainer's callbacks have none: throughput, utilization,
            the pipeline's idle time, memory and traffic, logged and shown.

    Raises:
        LayoutError: the layout cannot be read; or, when the Trainer is made, does not fit its devices.
        ConfigurationError: the schedule or the word for ``recompute``, ``fp8`` or ``init`` or the backend for ``compile`` is
            unknown, ``loss_weight`` is no such thing, ``memory_gib`` is not positive, ``hang_seconds`` is too short,
            ``detect_anomaly`` or ``drift_guard`` is no such thing, or an option in ``zero`` is unknown or not one of the layout.

    Attributes:
        layout: sizes of the axes; dp is known once the Trainer is made.
        schedule: name of the pipeline's schedule.
        options: what the other arguments said.
        precision: of the run, once the Trainer is made.
    """

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
        async_save: bool = False,
        timeout_seconds: float = 600.0,
        hang_seconds: float | None = 20.0,
        detect_anomaly: str | None = "first",
        drift_guard: int = 0,
        print_plan: bool = True,
        max_restarts: int = 0,
        audit: bool = True,
        monitor: bool = True,
    ) -> None:
        chosen, placed = choose_schedule(schedule, parse_layout(layout) if isinstance(layout, str) else layout)
        super().__init__(placed, str(layout), timedelta(seconds=timeout_seconds), schedule)
        self.schedule = chosen
        self.options = Options(
            overrides=read_overrides(plan, recompute, offload_activations, compile, fp8),
            zero=read_zero_options(zero),
            loss_weight=read_loss_weight(loss_weight),
            memory_gib=check_memory_gib(memory_gib),
            init=check_init_word(init),
            weights=weights,
            async_save=async_save,
            hang_seconds=check_hang_seconds(hang_seconds),
            print_plan=print_plan,
            detects_anomaly=check_anomaly_word(detect_anomaly),
            drift_guard=check_drift_guard(drift_guard),
            max_restarts=check_max_restarts(max_restarts),
            audit=audit,
            monitor=monitor,
        )
        if not placed.auto:
            check_zero_options(self.options.zero, placed, chosen, splits_backward(chosen, placed))
        self._plan: Plan | None = None
        self._steps: StepRunner | None = None
        self._updates: Updates | None = None

    # ------------------------------------------------------------------ the parts that do the work

    @property
    def plan(self) -> Plan:
        """All decisions of the run; there once the Trainer has started."""
        if self._plan is None:
            raise RuntimeError("the plan exists once trainer.fit, validate, test or predict has started")
        return self._plan

    @property
    def states(self) -> OptimizerStates:
        """The owner of the optimizer states; there while fitting."""
        assert self.engine.states is not None
        return self.engine.states

    @property
    def updates(self) -> Updates:
        """Who reduces, clips and steps; there while fitting."""
        assert self._updates is not None
        return self._updates

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """The norm that the last clipping found; None before."""
        return None if self._updates is None else self._updates.grad_norm

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

    # ------------------------------------------------------------------ before there are ranks

    def _configure_launcher(self) -> None:
        self._launcher = launcher_class(self.root)(
            self.cluster_environment,
            self.num_processes,
            self._num_nodes,
            describe=self.describe_rank,
            preflight=self._preflight,
            meet=self.meet,
            max_restarts=self.options.max_restarts,
        )

    def _preflight(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """Everything that can be found wrong without other ranks, before they are started; the plan, on rank 0."""
        self._trusts = bool(args) and args[-1] is False  # weights_only, which Lightning 2.6 drops where ranks read after setup
        module = args[0] if args and args[0] is not None else trainer.lightning_module
        if self.layout.auto:
            materialize_attributes(module)
            self.choose_layout(trainer, module, *args[1:], **kwargs)
            if self.layout.auto:
                return  # until the ranks meet
        check_run(trainer, [*args, *kwargs.values()])
        leave_inference_mode(trainer)
        materialize_attributes(module)
        engine = check_split(module, self.layout, self.precision)
        if engine is not None:
            self._engine, self._mesh, self._plan = engine, engine.mesh, engine.plan
            return
        if self.global_rank == 0:
            plan = plan_from_trainer(trainer, trainer.state.fn.value, module, *args[1:], keep=self.keep_for_audit, **kwargs)
            self._plan = plan if self.choice is None else replace(plan, notes=self.choice.reasons + plan.notes)
        guard_setup(module)

    # ------------------------------------------------------------------ setup

    def setup(self, trainer: Any) -> None:
        """Install the plan on the module, then make the optimizers over what this rank holds."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self.lightning_module
        if self._engine is None or self._engine.module is not module:
            self._install(module, is_fitting=trainer.state.fn == "fit")
            folder = trainer.log_dir if trainer.loggers else None  # every rank asks: the answer is broadcast
            if self.is_global_zero:
                report_plan(self.plan, self.schedule, folder, self.options.print_plan)
        watch_engine(self.engine, self._launcher, self.options.hang_seconds)
        self._steps = StepRunner(self.engine, self.options.loss_weight, self.options.detects_anomaly)
        share_generators(self.mesh.replica)
        self._data = DataResumption(trainer, self.dp_size) if trainer.state.fn == "fit" else None
        self.engine.loss_scale = read_scale(self._chosen_precision) if trainer.state.fn == "fit" else None
        if trainer.state.fn == "fit":
            module.__dict__["optimizer_zero_grad"] = _do_nothing  # gradients are there before Lightning would clear them
            self.setup_optimizers(trainer)
            if self.options.monitor:
                monitor_training(trainer, self.root)
            stop_politely(trainer, self.root)
            self.begin_training()
        self.setup_precision_plugin()

    def tensor_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[None]:
        """Around ``configure_model``: what it builds is built on the CPU, and moved as shards."""
        return nullcontext()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Around ``configure_model``: what it builds has no memory for weights yet."""
        module = self.lightning_module
        assert module is not None
        with configuring(module, self.options.init):
            yield

    def _install(self, module: Any, is_fitting: bool) -> None:
        materialize_attributes(module)
        plans: list[Any] = [self._plan, torch.initial_seed()]
        dist.broadcast_object_list(plans, src=0, group=self.mesh.world.group)
        self._plan, seed = plans
        weights = None if self.options.weights is None else match_weights(module, self.options.weights)
        late = LateValues() if is_fitting and partitions_late(self.layout, self.options.zero) else None
        self._engine = Engine(module, self.plan, self.mesh, self.root_device, self.schedule, seed, self.precision, weights, late)

    def setup_optimizers(self, trainer: Any) -> None:
        try:
            with self.engine.late.filling():
                super().setup_optimizers(trainer)
        except ValueError as error:
            check_trainable(self.lightning_module, self.mesh.coordinate, error)
            raise
        check_optimization(self.lightning_module, self.optimizers, self.layout)
        for warning in overwritten(self.layout.zero, self.options.zero) if self.layout.zero else ():
            rank_zero_warn(warning)
        self.engine.own_states(self.optimizers, self.options.zero)
        self._updates = Updates(self.engine, self._running.anomaly, self.options.drift_guard)

    def model_to_device(self) -> None:
        """The engine moves this rank's shards when it installs them."""

    # ------------------------------------------------------------------ steps

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of one batch through all stages; the mean loss, equal on every rank, without a graph."""
        module, steps = self.lightning_module, self._running
        self.checkpoints.check()
        if not module.automatic_optimization:
            return steps.run_whole(batch, args, kwargs)
        trainer = module.trainer
        batch_idx = args[0] if args else 0
        if batch_idx % trainer.accumulate_grad_batches == 0:
            type(module).optimizer_zero_grad(module, trainer.current_epoch, batch_idx, self.optimizers[0])
            self.states.zero_grad()
            if steps.anomaly is not None:
                steps.anomaly.forget()  # what was not stepped on, too
        return steps.train(batch, args, kwargs, 1 / trainer.accumulate_grad_batches)

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The hooks around a backward; the backward itself has run, except in manual optimization."""
        module = self.lightning_module
        if not module.automatic_optimization:
            scale = self.engine.loss_scale
            scaled = closure_loss if scale is None else closure_loss * scale.scale
            return super().backward(scaled, optimizer, *args, **kwargs)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        return self.precision_plugin.post_backward(closure_loss, module)

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

    # ------------------------------------------------------------------ teardown

    def teardown(self) -> None:
        module = self.lightning_module
        if module is not None:
            for name in ("optimizer_zero_grad", "setup"):
                module.__dict__.pop(name, None)
        self.finish_saving()
        if self._steps is not None:
            self.engine.watchdog.stop()
            self._steps.close()
            self._steps = None
        for part in (self.precision_plugin, self.cluster_environment, self.accelerator, self.checkpoint_io):
            if part is not None:  # the base class would also move the module away from its device
                part.teardown()


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None
