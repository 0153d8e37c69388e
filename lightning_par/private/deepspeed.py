"""Every private name of DeepSpeed that this package relies on, with the reason. Read in DeepSpeed 0.19.8.

ZeRO there is bound to ``engine.forward`` and ``engine.backward``; a pipeline runs several microbatches through parts of the
module and reduces once. So the engine is built, its gradient hooks are removed, and what they would have called is called
here, once per optimizer step. Nothing in this file imports DeepSpeed before `start_zero_engine` runs: a run without ZeRO
never loads it.
"""

from __future__ import annotations

import importlib
import logging
import os
import textwrap
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_par.errors import ConfigurationError

DEEPSPEED_VERSION = "0.19.8"
_REMEDY = f"install deepspeed=={DEEPSPEED_VERSION}, or train without ZeRO (zero0)"

# module, object in it, attributes that must exist on it
_DEEPSPEED_NAMES = (
    # process-wide, and left set by engine.destroy: who is the mpu, and the groups of ZeRO++'s second partition
    ("deepspeed.utils.groups", "mpu", ()),
    ("deepspeed.utils.groups", "_ZERO_PARAM_INTRA_PARALLEL_GROUP", ()),
    # one pass of the reduction over gradients that piled up in p.grad; what engine.coalesce_grad_reduction runs on exit. That
    # context itself is no option: it also runs its collectives while an exception flies through, and the peers hang
    ("deepspeed.runtime.engine", "DeepSpeedEngine", ("_flush_coalesced_reduction_zero12", "_flush_coalesced_reduction_zero3")),
    # stage 1, 2: republish the weights from the masters after a load
    ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer", ("update_lp_params",)),
    # stage 3: its own norm is one collective per parameter group; where a partition begins; the other two republish the weights
    # after a load
    (
        "deepspeed.runtime.zero.stage3",
        "DeepSpeedZeroOptimizer_Stage3",
        (
            "_get_norm_groups",
            "_get_param_partition_rank",
            "_partition_all_parameters",
            "_reassign_or_swap_out_partitioned_parameters",
        ),
    ),
    # stage 3: the stack of modules whose forward is running, which an exception through a forward leaves behind
    ("deepspeed.runtime.zero.parameter_offload", "FWD_MODULE_STACK", ()),
    ("deepspeed.runtime.zero.parameter_offload", "apply_to_tensors_only", ()),
    ("deepspeed.runtime.zero.utils", "apply_to_tensors_only", ()),
    (
        "deepspeed.runtime.zero.partitioned_param_coordinator",
        "PartitionedParameterCoordinator",
        ("release_sub_module", "release_backward_leftovers"),
    ),
    # stage 3: a module's own parameters and those it borrows from others
    ("deepspeed.runtime.zero.partitioned_param_coordinator", "iter_params", ()),
)


def check_deepspeed(names: tuple[tuple[str, str, tuple[str, ...]], ...] = _DEEPSPEED_NAMES) -> None:
    """Check that DeepSpeed is there and has every private name that this file uses.

    Args:
        names: module, object in it, attributes of that object.

    Raises:
        ConfigurationError: it is missing or another version; says which one to install.
    """
    try:
        importlib.import_module("deepspeed")
        for module, name, attributes in names:
            _require(getattr(importlib.import_module(module), name), attributes)
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"ZeRO stages 1 to 3 need DeepSpeed, and '{error.name}' cannot be imported: {_REMEDY}") from error
    except AttributeError as error:
        raise _wrong_version(error) from error


def _require(owner: Any, attributes: Iterable[str]) -> None:
    for attribute in attributes:
        getattr(owner, attribute)


def _wrong_version(missing: AttributeError) -> ConfigurationError:
    found = importlib.import_module("deepspeed").__version__
    return ConfigurationError(f"DeepSpeed {found} is not the one that ZeRO here was written for ({missing}): {_REMEDY}")


def check_operator(error: BaseException) -> None:
    """Explain an error that DeepSpeed raised while it built one of its C++ operators, as for ``DeepSpeedCPUAdam``.

    Args:
        error: anything.

    Raises:
        ConfigurationError: it is such an error; names the operator and what to install.
    """
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in reversed(causes):  # what went wrong first says the most
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            builder: Any = frame.f_locals.get("self")
            if frame.f_globals.get("__name__", "").startswith("deepspeed.ops.op_builder") and hasattr(builder, "NAME"):
                reason = textwrap.shorten(str(cause), 100) or type(cause).__name__  # of a compiler it is its whole command
                raise ConfigurationError(
                    f"DeepSpeed's operator {builder.NAME} cannot be built on this machine ({reason}): install a C++ compiler (g++) "
                    "and ninja (pip install ninja), or use an optimizer of torch, such as torch.optim.AdamW"
                ) from error


def mark_stepped(optimizer: Optimizer) -> None:
    """Tell learning-rate schedulers that ``optimizer`` stepped, though another object did it for it.

    They warn of a wrong order unless their wrapper of ``optimizer.step`` has set this mark (torch 2.13, lr_scheduler.py).
    """
    optimizer._opt_called = True  # type: ignore[attr-defined]


def start_zero_engine(
    stage: int,
    root: nn.Module,
    optimizer: Optimizer,
    mpu: object,
    config: dict[str, Any],
    device: torch.device,
    units: Iterable[nn.Module] = (),
) -> ZeroEngine:
    """Build DeepSpeed's engine for ZeRO stage 1, 2 or 3. Collective over the world.

    Args:
        stage: ZeRO stage.
        root: holds the parameters (stage 3: the modules too). Its own ``forward`` must never be called: DeepSpeed
            broadcasts over the world there.
        optimizer: a torch optimizer that DeepSpeed may take apart.
        mpu: what DeepSpeed asks about the ranks.
        config: DeepSpeed's configuration.
        device: where the parameters are.
        units: in stage 3, modules inside ``root`` whose parameters are gathered all at once.

    Raises:
        ConfigurationError: DeepSpeed is missing or another version.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it guesses, with a warning
    check_deepspeed()
    quieten_deepspeed(device)
    deepspeed = importlib.import_module("deepspeed")
    marks = _Marks(root)
    for unit in units if stage == 3 else ():
        deepspeed.utils.set_z3_leaf_module(unit, True)
    engine, *_ = deepspeed.initialize(model=root, optimizer=optimizer, mpu=mpu, config=config)
    marks.find()
    kind = ZeroEngine3 if stage == 3 else ZeroEngine12
    try:
        _require(engine.optimizer, kind.NAMES)
    except AttributeError as error:
        raise _wrong_version(error) from error
    return kind(engine, marks)


def quieten_deepspeed(device: torch.device) -> None:
    """Keep DeepSpeed, once imported, from compiling, starting programs, and writing to the terminal."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # read when an engine starts on CPU, to decide on building an extension of its own for collectives. Read for the first
    # time, it tries every extension with the C compiler, which writes to stderr; so it must not be read before it is set
    vars(importlib.import_module("deepspeed.ops")).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    if device.type == "cpu":  # the number of devices; else stage 3 starts `numactl` at every reduction to count them
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    warnings.filterwarnings(
        "ignore",
        r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",
        FutureWarning,
        r"torch\.distributed\.",
    )


class _Marks:
    """The attributes that DeepSpeed puts on modules and parameters.

    It leaves them there. They keep its optimizer alive, and a second engine on the same module would take the parameters
    for partitioned and call the hooks of the first.
    """

    WHILE_RUNNING = ("ds_grads_remaining", "applied_pre_backward_ref_cnt")

    def __init__(self, root: nn.Module) -> None:
        self.names = {marked: set(vars(marked)) for marked in (*root.modules(), *root.parameters())}

    def find(self) -> None:
        """What is new since this object was built."""
        self.names = {marked: vars(marked).keys() - names for marked, names in self.names.items()}

    def remove(self) -> None:
        for marked, names in self.names.items():
            if "_original_parameters" in names:  # stage 3 replaces the dict of a module's parameters
                vars(marked)["_parameters"] = vars(marked)["_original_parameters"]
            for name in (*names, *self.WHILE_RUNNING):
                vars(marked).pop(name, None)


class ZeroEngine(ABC):
    """A started DeepSpeed engine without its gradient hooks: gradients pile up in ``p.grad`` until `flush`.

    Attributes:
        NAMES: what DeepSpeed's ZeRO optimizer must have, once started.
    """

    NAMES: tuple[str, ...]

    def __init__(self, engine: Any, marks: _Marks) -> None:
        self.engine, self.root, self.zero, self.marks = engine, engine.module, engine.optimizer, marks
        # they reduce at every backward of engine.backward, and lose gradients where backwards follow one another
        for hook in self.zero._grad_acc_hooks:
            hook.remove()
        self.zero._grad_acc_hooks.clear()

    @property
    def inner(self) -> Optimizer:
        """The torch optimizer that steps the masters."""
        inner: Optimizer = self.zero.optimizer
        return inner

    def _clear_offloaded(self) -> None:
        """Where gradients are with the masters on the host: a parameter that has none in this backward would keep the last one."""
        for master in self.masters:
            if master.grad is not None:
                master.grad.zero_()

    @property
    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The flat weights that this rank steps, by group (stage 3: by sub-group)."""

    @property
    def buffers(self) -> list[Tensor]:
        """What is kept for gradients besides ``p.grad``, from step to step."""
        return []

    @abstractmethod
    def flush(self) -> None:
        """Average ``p.grad`` over dp into partitions; ``p.grad`` is gone then. Collective over dp."""

    @abstractmethod
    def fragments(self) -> Iterator[tuple[Tensor, nn.Parameter, int]]:
        """The averaged gradient partitions between `flush` and `step`, live, each with its parameter and where in it it begins."""

    @abstractmethod
    def open_early(self) -> None:
        """Before the first `reduce_early` of a step: there is no gradient yet."""

    @abstractmethod
    def reduce_early(self, parameter: nn.Parameter) -> None:
        """During a backward: average ``parameter.grad`` over dp into its partition, at the latest in `close_early`. ``grad`` is
        gone then. Collective over dp: every dp rank calls it for the same parameters in the same order, each at most once
        before `close_early`."""

    @abstractmethod
    def close_early(self, late: Iterable[nn.Parameter]) -> None:
        """Reduce what `reduce_early` was given and has not reduced yet. Collective over dp.

        Args:
            late: the parameters that are left to `flush_late`; their gradients stay.
        """

    @abstractmethod
    def flush_late(self) -> None:
        """`flush` at the end of a step with `reduce_early`: the gradients left in ``p.grad``, added to the others."""

    @abstractmethod
    def publish(self) -> None:
        """Make the parameters what the masters say, after a load. Collective over dp."""

    def step(self) -> None:
        """Step the masters and publish them. Collective over dp."""
        self.zero.step()

    def forget_gradients(self) -> None:
        """Drop ``p.grad``, and what `flush` made of it."""
        self.zero.zero_grad()

    def whole(self, parameter: nn.Parameter) -> AbstractContextManager[None]:
        """While open, ``parameter.data`` is whole over dp. Collective over dp in stage 3."""
        return nullcontext()

    def stored(self, parameter: nn.Parameter) -> Tensor:
        """What this rank stores of a parameter, live."""
        return parameter.detach()

    @abstractmethod
    def detect_borrowed(self, is_on: bool) -> None:
        """While on, reading a parameter of a module that is not running gathers it (``F.linear(x, wte.weight)``)."""

    @abstractmethod
    def settle(self, keep: bool) -> None:
        """After a forward: close what an exception through it left open.

        Args:
            keep: the backward is still to come: keep the parameters of the modules around the cut. May be a collective
                over dp.
        """

    @abstractmethod
    def release_backward(self) -> None:
        """After a backward: release what was gathered for it."""

    def destroy(self) -> None:
        """Remove every hook and mark, and what DeepSpeed keeps process-wide. No collective.

        Stage 3 leaves the parameters empty.
        """
        self.engine.destroy()
        self.marks.remove()
        groups: Any = importlib.import_module("deepspeed.utils.groups")
        groups.mpu = None
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        del self.engine, self.zero, self.root, self.marks


class ZeroEngine12(ZeroEngine):
    """Stages 1 and 2: parameters are whole on every rank; masters, moments and in 2 gradients are partitioned."""

    NAMES = (
        "_grad_acc_hooks",
        "_gradient_reduction_buffer_dtype",
        "all_grad_tensors",
        "averaged_gradients",
        "cpu_offload",
        "first_offset",
        "micro_step_id",
        "params_in_partition",
        "reset_cpu_buffers",
        "single_partition_of_fp32_groups",
    )

    def __init__(self, engine: Any, marks: _Marks) -> None:
        super().__init__(engine, marks)
        # a valid norm, without a collective per group, where offload insists on one
        self.zero.scaled_global_norm = lambda norm_type=2: torch.zeros(())
        # contiguous gradients, which offload turns on, lie in a buffer of this: the gradients' dtype, not the parameters'
        self.zero._gradient_reduction_buffer_dtype = lambda: torch.float32
        self.group_of = {p: i for i, parameters in enumerate(self.zero.bit16_groups) for p in parameters}
        self.sums: list[Tensor] = []

    @property
    def masters(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def flush(self) -> None:
        self.engine._flush_coalesced_reduction_zero12(self.zero)

    def fragments(self) -> Iterator[tuple[Tensor, nn.Parameter, int]]:
        if self.zero.cpu_offload:
            yield from self._offloaded_fragments()
            return
        # the fragments of a group are in the order of its parameters; one more at the end is padding. Only the first parameter
        # may have begun in the partition before
        for group, parameters in enumerate(self.zero.params_in_partition):
            starts = chain((self.zero.first_offset[group],), repeat(0))
            yield from zip(self.zero.averaged_gradients[group], parameters, starts, strict=False)

    def forget_gradients(self) -> None:
        super().forget_gradients()
        # what a step would have done: else gradients of one that was not taken are added to the next ones, or a whole step is left
        # out because these were infinite
        self.zero.averaged_gradients = {}
        self.zero.micro_step_id = -1
        if self.zero.cpu_offload:
            self.zero.reset_cpu_buffers()

    def open_early(self) -> None:
        self.sums = [torch.zeros_like(master) for master in self.masters]
        self._clear_offloaded()

    def reduce_early(self, parameter: nn.Parameter) -> None:
        self.zero.micro_step_id = -1  # with offload, DeepSpeed would add up whole gradients on the host from the second pass on
        self.zero.setup_buckets()
        self.zero.reduce_ready_partitions_and_remove_grads(parameter, self.group_of[parameter])

    def close_early(self, late: Iterable[nn.Parameter]) -> None:
        kept = {parameter: parameter.grad for parameter in late}
        for parameter in kept:
            parameter.grad = None
        self.zero.overlapping_partition_gradients_reduce_epilogue()  # it drops all gradients, those of `late` too
        for total, gradients in zip(self.sums, self._reduced(), strict=True):
            for part, gradient in zip(total.split([each.numel() for each in gradients]), gradients, strict=True):
                part.add_(gradient.reshape(-1))
        for group in list(self.zero.averaged_gradients):
            self.zero.averaged_gradients[group] = None
        self._clear_offloaded()
        for parameter, grad in kept.items():
            parameter.grad = grad

    def flush_late(self) -> None:
        self.zero.micro_step_id = -1
        self.flush()
        for total, gradients in zip(self.sums, self._reduced(), strict=True):
            for part, gradient in zip(total.split([each.numel() for each in gradients]), gradients, strict=True):
                gradient.add_(part.view_as(gradient))
        self.sums = []

    def _reduced(self) -> list[list[Tensor]]:
        """What the last reduction left of each group, in pieces that make up the partition."""
        if self.zero.cpu_offload:
            return [[master.grad] for master in self.masters if master.grad is not None]
        return [list(self.zero.averaged_gradients[group]) for group in range(len(self.masters))]

    def _offloaded_fragments(self) -> Iterator[tuple[Tensor, nn.Parameter, int]]:
        """Gradients are with the masters on the host: parameter by parameter, from where in it to where there, how many."""
        for group, parameters in enumerate(self.zero.params_in_partition):
            for parameter in parameters:
                _, start, place, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
                yield self.masters[group].grad.view(-1).narrow(0, place, length), parameter, start  # type: ignore[union-attr]

    def publish(self) -> None:
        self.zero.update_lp_params()
        self.zero._hp_optimizer_states_linked = False  # else its fragment API keeps the moments before the load alive

    def detect_borrowed(self, is_on: bool) -> None:
        """Nothing is ever away."""

    def settle(self, keep: bool) -> None:
        """Nothing is ever open."""

    def release_backward(self) -> None:
        """Nothing is ever gathered."""


class ZeroEngine3(ZeroEngine):
    """Stage 3: parameters are partitioned too; hooks of each module gather them for its forward and its backward.

    A pipeline stage ends its forward by an exception, so the closing hooks of the modules around the cut never run, nor the
    opening hooks of their backward. `settle` stands in for both.
    """

    NAMES = (
        "_grad_acc_hooks",
        "_leaf_module_hooks",
        "averaged_gradients",
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "grad_partitions_flat_buffer",
        "grad_position",
        "micro_step_id",
        "offload_optimizer",
        "parameter_offload",
        "persistent_parameters",
    )

    def __init__(self, engine: Any, marks: _Marks) -> None:
        super().__init__(engine, marks)
        self.offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
        self.coordinator = self.zero.parameter_offload.get_param_coordinator()
        self.depth = len(self.offload.FWD_MODULE_STACK)  # the root is on it for good
        self.zero._get_norm_groups = lambda: [torch.zeros(())]  # a valid norm, without a collective per group
        for hook in self.zero._leaf_module_hooks:  # as those of single parameters
            hook.remove()
        self.zero._leaf_module_hooks.clear()
        self.undo_mapping = _map_local_tensors()

    @property
    def masters(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    @property
    def buffers(self) -> list[Tensor]:
        return [self.zero.grad_partitions_flat_buffer]

    def flush(self) -> None:
        self.engine._flush_coalesced_reduction_zero3(self.zero)

    def fragments(self) -> Iterator[tuple[Tensor, nn.Parameter, int]]:
        for group, parameters in enumerate(self.zero.fp16_groups):
            gradients = self._offloaded(group) if self.zero.offload_optimizer else self.zero.averaged_gradients[group]
            for gradient, parameter in zip(gradients, parameters, strict=True):
                yield gradient, parameter, self.zero._get_param_partition_rank(parameter) * parameter.partition_numel()

    def open_early(self) -> None:
        self.zero.grad_partitions_flat_buffer.zero_()
        self._clear_offloaded()

    def reduce_early(self, parameter: nn.Parameter) -> None:
        self._add_up(is_last=False)
        self.zero.reduce_ready_partitions_and_remove_grads(parameter)

    def close_early(self, late: Iterable[nn.Parameter]) -> None:
        self.zero.independent_gradient_partition_epilogue()  # in this stage it leaves other gradients alone

    def flush_late(self) -> None:
        self._add_up(is_last=True)
        self.flush()
        if self.zero.offload_optimizer:  # what was reduced before has not gone to the host yet
            self.zero._finalize_offload_gradient_accumulation()

    def _add_up(self, is_last: bool) -> None:
        """Let a reduction add to what the partition has; by itself DeepSpeed does so from the second of a step on."""
        self.zero.micro_step_id = 1
        self.zero.set_gradient_accumulation_boundary(is_last)

    def _offloaded(self, group: int) -> Iterator[Tensor]:
        """Gradients are with the masters on the host."""
        for parameter in self.zero.fp16_groups[group]:
            _, place, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
            yield self.masters[group].grad.narrow(0, place, length)  # type: ignore[union-attr]

    def publish(self) -> None:
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:  # small ones that an option of the user keeps whole
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def whole(self, parameter: nn.Parameter) -> AbstractContextManager[None]:
        gathered: AbstractContextManager[None] = importlib.import_module("deepspeed").zero.GatheredParameters([parameter])
        return gathered

    def stored(self, parameter: nn.Parameter) -> Tensor:
        partitioned: Any = parameter
        view: Tensor = partitioned.ds_tensor.detach()  # without DeepSpeed's attributes, which cannot be saved
        return view

    def detect_borrowed(self, is_on: bool) -> None:
        for module in self.root.modules():
            parameters: Any = module._parameters
            parameters._in_forward = is_on

    def settle(self, keep: bool) -> None:
        for module in [self.root, *self._unwind()]:
            if keep:
                self._keep(module)
            else:
                self.coordinator.release_sub_module(module, forward=True)

    def release_backward(self) -> None:
        for module in self._unwind():  # left by a recomputation that stopped early
            self.coordinator.release_sub_module(module, forward=True)
        self.coordinator.release_backward_leftovers()

    def destroy(self) -> None:
        del self.offload.FWD_MODULE_STACK[self.depth - 1 :]
        self.undo_mapping()
        super().destroy()
        del self.coordinator

    def _keep(self, module: nn.Module) -> None:
        """Keep a module's parameters, own and borrowed, until the step."""
        vars(module)["ds_grads_remaining"] = -(2**30)  # never counts down to the closing backward hook
        for parameter in self.offload.iter_params(module, recurse=getattr(module, "_z3_leaf", False)):
            parameter.ds_active_sub_modules.add(module.ds_id)
            if parameter.ds_status.name == "NOT_AVAILABLE":
                parameter.all_gather()

    def _unwind(self) -> list[nn.Module]:
        stack: list[nn.Module] = self.offload.FWD_MODULE_STACK
        left = stack[self.depth :]
        del stack[self.depth :]
        return left


def _map_local_tensors() -> Callable[[], None]:
    """Make stage 3's hooks act on the inside of tensors that have ``map_local``; returns what undoes it.

    The hooks put an autograd function on every tensor that enters or leaves a module. A tensor that shows a global shape
    and computes on its ``local`` part has its graph inside: a function applied to the outside would cut it off.
    """
    owners: list[Any] = [importlib.import_module(f"deepspeed.runtime.zero.{name}") for name in ("utils", "parameter_offload")]
    original = owners[0].apply_to_tensors_only

    def apply_to_tensors_only(function: Callable[[Tensor], Tensor], value: Any, warning_msg_fn: Any = None) -> Any:
        if isinstance(value, Tensor) and hasattr(value, "map_local"):
            return value.map_local(function)
        return original(function, value, warning_msg_fn=warning_msg_fn)

    def restore() -> None:
        for owner in owners:
            owner.apply_to_tensors_only = original

    for owner in owners:
        owner.apply_to_tensors_only = apply_to_tensors_only
    return restore
