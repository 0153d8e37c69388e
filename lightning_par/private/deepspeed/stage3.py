"""ZeRO stage 3 on a started engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_par.private.deepspeed.ahead import GatheringAhead
from lightning_par.private.deepspeed.call import count_calls_apart, keep_call
from lightning_par.private.deepspeed.engine import ZeroEngine
from lightning_par.private.deepspeed.gathered import GatheredWeights
from lightning_par.private.deepspeed.mark import Marks
from lightning_par.private.deepspeed.state_file import StateFiles


class ZeroEngine3(ZeroEngine):
    """Stage 3: parameters are partitioned too; hooks of each module gather them for its forward and its backward.

    A pipeline stage ends its forward by an exception, so the closing hooks of the modules around the cut never run, nor the
    opening hooks of their backward. `settle` stands in for both.
    """

    NAMES = (
        "_grad_acc_hooks",
        "_leaf_module_hooks",
        "fp16_groups",
        "fp16_partitioned_groups_flat_numel",
        "fp32_partitioned_groups_flat",
        "grad_partitions_flat_buffer",
        "micro_step_id",
        "offload_optimizer",
        "parameter_offload",
        "persistent_parameters",
    )

    def __init__(self, engine: Any, marks: Marks) -> None:
        super().__init__(engine, marks)
        self.offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
        self.coordinator = self.zero.parameter_offload.get_param_coordinator()
        self.modules = list(self.root.modules())
        self.depth = len(self.offload.FWD_MODULE_STACK)  # the root is on it for good
        self.zero._get_norm_groups = lambda: [torch.zeros(())]  # a valid norm, without a collective per group
        for hook in self.zero._leaf_module_hooks:  # as those of single parameters
            hook.remove()
        self.zero._leaf_module_hooks.clear()
        # at one, DeepSpeed would copy each gradient to its master on the host or to a file at once: `step` does it for all
        self.zero.set_gradient_accumulation_boundary(False)
        self.files = StateFiles(self.zero)
        self.undo_mapping = _map_local_tensors()
        units = [module for module in self.modules if getattr(module, "_z3_leaf", False)]
        self.ahead = GatheringAhead(self.coordinator, units, self._parameters_of)
        self.gathered = GatheredWeights(self.coordinator, self._parameters_of, self.ahead.arrive)
        for module in self.modules:
            if "post_bwd_fn" in vars(module):  # nothing inside a unit has one
                count_calls_apart(module, self.zero.parameter_offload.post_sub_module_backward_function)

    @property
    def masters(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    @property
    def buffers(self) -> list[Tensor]:
        return [self.zero.grad_partitions_flat_buffer]

    def pieces(self, group: int) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        place = 0
        for parameter in self.zero.fp16_groups[group]:
            start, length = self._range_of(parameter)
            yield parameter, start, place, length
            place += parameter.partition_numel()

    def flush(self) -> None:
        for parameter in chain.from_iterable(self.zero.fp16_groups):
            _make_contiguous(parameter)
        self.engine._flush_coalesced_reduction_zero3(self.zero)

    def fragments(self) -> Iterator[tuple[Tensor, nn.Parameter, int]]:
        parameters = list(chain.from_iterable(self.zero.fp16_groups))
        gradients = self.zero.grad_partitions_flat_buffer.split([parameter.partition_numel() for parameter in parameters])
        for gradient, parameter in zip(gradients, parameters, strict=True):
            yield gradient, parameter, self._range_of(parameter)[0]

    def open_early(self) -> None:
        self.zero.grad_partitions_flat_buffer.zero_()

    def reduce_early(self, parameter: nn.Parameter) -> None:
        self.zero.micro_step_id = 1  # add to what the partition has; by itself DeepSpeed does so from the second of a step on
        _make_contiguous(parameter)
        self.zero.reduce_ready_partitions_and_remove_grads(parameter)

    def close_early(self, late: Iterable[nn.Parameter]) -> None:
        self.zero.independent_gradient_partition_epilogue()  # in this stage it leaves other gradients alone

    def flush_late(self) -> None:
        self.zero.micro_step_id = 1
        self.flush()

    def step(self) -> None:
        if self.zero.offload_optimizer:
            gradients = self.zero.grad_partitions_flat_buffer.split(self.zero.fp16_partitioned_groups_flat_numel)
            for group, (master, gradient) in enumerate(zip(self.masters, gradients, strict=True)):
                if self.files.has(group):
                    self.files.give_gradient(group, gradient)
                else:
                    master.grad = gradient.to(master.device)
        super().step()

    def files_to_come(self, states: Iterable[str]) -> dict[str, int]:
        return self.files.to_come(states)

    def read_state(self, group: int) -> tuple[Tensor, dict[str, Any]]:
        return self.files.read(group) if self.files.has(group) else super().read_state(group)

    @contextmanager
    def state_replaced(self, group: int) -> Iterator[Tensor]:
        self.files.forget(group)
        with self.files.loaded(group):
            yield self.masters[group]

    def publish(self) -> None:
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            with self.files.loaded(group):
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

    def stored_piece(self, parameter: nn.Parameter) -> tuple[Tensor, int, bool]:
        start, length = self._range_of(parameter)
        return self.stored(parameter).narrow(0, 0, length), start, False

    def detect_borrowed(self, is_on: bool) -> None:
        for module in self.modules:
            parameters: Any = module._parameters
            parameters._in_forward = is_on

    def saving(self) -> AbstractContextManager[object]:
        return self.gathered.saving()

    def settle(self, keep: bool) -> None:
        self.ahead.forget()
        self.gathered.forget()
        for module in [self.root, *self._unwind()]:
            if keep:
                self._keep(module)
            else:
                self.coordinator.release_sub_module(module, forward=True)

    def release_backward(self) -> None:
        self.ahead.forget()
        for module in self._unwind():  # left by a recomputation that stopped early
            self.coordinator.release_sub_module(module, forward=True)
        self.coordinator.release_backward_leftovers()
        self.gathered.release()

    def destroy(self) -> None:
        del self.offload.FWD_MODULE_STACK[self.depth - 1 :]
        self.undo_mapping()
        super().destroy()
        del self.coordinator, self.gathered, self.ahead, self.files, self.modules

    def _keep(self, module: nn.Module) -> None:
        """Keep a module's parameters, own and borrowed, until the step."""
        keep_call(module)
        for parameter in self._parameters_of(module):
            parameter.ds_active_sub_modules.add(module.ds_id)
            if parameter.ds_status.name == "NOT_AVAILABLE":
                parameter.all_gather()

    def _range_of(self, parameter: Any) -> tuple[int, int]:
        """Where this rank's partition of a parameter begins in it, and how much of it is no padding."""
        start = self.zero._get_param_partition_rank(parameter) * parameter.partition_numel()
        return start, max(0, min(parameter.partition_numel(), parameter.ds_numel - start))

    def _parameters_of(self, module: nn.Module) -> Iterable[Any]:
        """Those that are gathered for a module, own and borrowed."""
        parameters: Iterable[Any] = self.offload.iter_params(module, recurse=getattr(module, "_z3_leaf", False))
        return parameters

    def _unwind(self) -> list[nn.Module]:
        stack: list[nn.Module] = self.offload.FWD_MODULE_STACK
        left = stack[self.depth :]
        del stack[self.depth :]
        return left


def _make_contiguous(parameter: nn.Parameter) -> None:
    """What DeepSpeed flattens must be contiguous; the layer decides what strides its gradient has."""
    if parameter.grad is not None and not parameter.grad.is_contiguous():
        parameter.grad.data = parameter.grad.contiguous()


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
