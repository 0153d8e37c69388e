"""ZeRO stages 1 and 2 on a started engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn

from lightning_par.private.deepspeed.engine import ZeroEngine
from lightning_par.private.deepspeed.mark import Marks


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

    def __init__(self, engine: Any, marks: Marks) -> None:
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

    @property
    def buffers(self) -> list[Tensor]:
        return self.sums

    def pieces(self, group: int) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        place = 0
        for index, parameter in enumerate(self.zero.params_in_partition[group]):
            start = 0 if index else self.zero.first_offset[group]
            length = min(parameter.numel() - start, self.masters[group].numel() - place)
            yield parameter, start, place, length
            place += length

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

    def _clear_offloaded(self) -> None:
        """Where gradients are with the masters on the host: a parameter that has none in this backward would keep the last one."""
        for master in self.masters:
            if master.grad is not None:
                master.grad.zero_()

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
