"""Bytes of parameters, gradients and optimizer states on a rank, counted from the plan; exact, by ZeRO (arXiv 1910.02054).

With n local elements of a rank, d replicas, e bytes of an element, k bytes of optimizer state for each element::

    zero   parameters    gradients     optimizer states
    0      e n           g n           k n, with masters (4 + k) n
    1, 2   e n'          g n           (4 + k) n'/d       n': each parameter group, padded to a multiple of 2 d elements
    3      e n''/d       g n + 4 n''/d (4 + k) n''/d      n'': each parameter, padded to a multiple of d elements

Gradients add up in at least fp32: g = max(e, 4). Half-precision parameters have fp32 masters.

Gradients are those of all microbatches before their one reduction, when they are most: a pipeline keeps them whole in every stage
of ZeRO. Stage 3 has a buffer of fp32 for the partition besides. The 4 of the states are the fp32 masters that DeepSpeed steps, a
copy even of fp32 weights.

Options of ZeRO: with ``reduce: microbatch`` gradients are 4 n'/d or 4 n''/d, and g for each element of those that stay whole until
the end of the step; what a backward has at once until a bucket is reduced is not counted. What is offloaded is not counted, nor
are the partitions of gradients, which go with the states: it is not on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lightning_par.layout import Layout
from lightning_par.memory.gathered import most_gathered
from lightning_par.memory.optimizer import GroupForm, OptimizerForm
from lightning_par.plan import Plan
from lightning_par.plan.plan import ParameterPlan
from lightning_par.zero.early import is_late
from lightning_par.zero.option import MICROBATCH, ZeroOptions

_FP32 = 4  # bytes
_ALIGNMENT = 2  # elements of each partition of a group in stages 1 and 2 (DeepSpeed 0.19.8, nccl_start_alignment_factor)


@dataclass(frozen=True)
class StateBytes:
    """Bytes on a rank.

    Attributes:
        parameters, gradients, states: see the top of this file.
        gathered: the most of parameters that stage 3 has whole at once, see `lightning_par.memory.gathered`.
    """

    parameters: int
    gradients: int
    states: int
    gathered: int = 0


def state_bytes(plan: Plan, pp: int, optimizer: OptimizerForm, options: ZeroOptions | None = None) -> StateBytes:
    """What each rank at a pp coordinate stores on its device; all dp and tp coordinates the same.

    Args:
        plan: all decisions.
        pp: the coordinate.
        optimizer: what it keeps.
        options: the section ``zero``.
    """
    held = [parameter for parameter in plan.parameters if any(pp in holders for _, holders in parameter.aliases)]
    found = held_bytes(held, plan.layout, optimizer, options)
    is_gathered = plan.layout.zero == 3 and (plan.layout.dp or 1) > 1
    return replace(found, gathered=most_gathered(plan, pp, held)) if is_gathered else found


def held_bytes(
    held: Sequence[ParameterPlan], layout: Layout, optimizer: OptimizerForm, options: ZeroOptions | None = None
) -> StateBytes:
    """What a rank stores of the parameters that it holds, but for what is gathered.

    Args:
        held: they; each once.
        layout: sizes of the axes.
        optimizer: what it keeps.
        options: the section ``zero``.
    """
    count = _Count(held, layout.tp, layout.dp or 1, options or ZeroOptions())
    zero = layout.zero if count.dp > 1 else 0
    if zero == 0:
        return count.replicated(optimizer)
    return count.partitioned_states(optimizer) if zero < 3 else count.partitioned_parameters(optimizer)


class _Count:
    """The parameters of a rank.

    Args:
        held: the rank's parameters.
        tp, dp: sizes of the axes.
        options: the section ``zero``.
    """

    def __init__(self, held: Sequence[ParameterPlan], tp: int, dp: int, options: ZeroOptions) -> None:
        self.held, self.tp, self.dp, self.options = held, tp, dp, options

    def replicated(self, optimizer: OptimizerForm) -> StateBytes:
        states = 0
        for group in optimizer.groups:
            sizes = self._sizes(self._members(group))
            states += sum(sizes) * group.element_bytes + len(sizes) * group.tensor_bytes
            states += sum(_FP32 * member.local_numel(self.tp) for member in self._members(group) if member.itemsize < _FP32)
        return StateBytes(self._bytes(self.held), self._gradients(self.held), states)

    def partitioned_states(self, optimizer: OptimizerForm) -> StateBytes:
        """Stages 1 and 2: parameters are views of one flat tensor for each group."""
        stepped, parameters, states, sums = set[str](), 0, 0, 0
        for group in optimizer.groups:
            members = self._members(group)
            if members:
                flat = _padded(sum(self._sizes(members)), _ALIGNMENT * self.dp)
                parameters += flat * members[0].itemsize
                states += flat // self.dp * (_FP32 + group.element_bytes) + group.tensor_bytes
                sums += flat // self.dp * _FP32
                stepped |= {member.spec.name for member in members}
        others = self._bytes(parameter for parameter in self.held if parameter.spec.name not in stepped)
        return self._stored(parameters + others, sums if self.options.reduce == MICROBATCH else 0, states)

    def partitioned_parameters(self, optimizer: OptimizerForm) -> StateBytes:
        """Stage 3: each parameter is a part of itself."""
        parameters = sum(self._part(parameter) * parameter.itemsize for parameter in self.held)
        buffer, states = 0, 0
        for group in optimizer.groups:
            members = self._members(group)
            parts = sum(map(self._part, members))
            buffer += _FP32 * parts
            states += parts * (group.element_bytes + _FP32) + group.tensor_bytes * bool(members)
        return self._stored(0 if self.options.offload_param else parameters, buffer, states)

    def _stored(self, parameters: int, partitions: int, states: int) -> StateBytes:
        """With partitions of gradients, which are with the states."""
        whole = [p for p in self.held if is_late(p.spec, self.tp)] if self.options.reduce == MICROBATCH else self.held
        if self.options.offload_optimizer:
            partitions = states = 0
        return StateBytes(parameters, self._gradients(whole) + partitions, states)

    def _members(self, group: GroupForm) -> list[ParameterPlan]:
        return [parameter for parameter in self.held if parameter.spec.name in group.names]

    def _sizes(self, parameters: Iterable[ParameterPlan]) -> list[int]:
        return [parameter.local_numel(self.tp) for parameter in parameters]

    def _bytes(self, parameters: Iterable[ParameterPlan]) -> int:
        return sum(parameter.local_numel(self.tp) * parameter.itemsize for parameter in parameters)

    def _gradients(self, whole: Iterable[ParameterPlan]) -> int:
        return sum(p.local_numel(self.tp) * max(p.itemsize, _FP32) for p in whole if p.requires_grad)

    def _part(self, parameter: ParameterPlan) -> int:
        return _padded(parameter.local_numel(self.tp), self.dp) // self.dp


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
