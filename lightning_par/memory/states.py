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
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lightning_par.memory.gathered import most_gathered
from lightning_par.memory.optimizer import GroupForm, OptimizerForm
from lightning_par.plan import Plan
from lightning_par.plan.plan import ParameterPlan

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


def state_bytes(plan: Plan, pp: int, optimizer: OptimizerForm) -> StateBytes:
    """What each rank at a pp coordinate stores; all dp and tp coordinates the same.

    Args:
        plan: all decisions.
        pp: the coordinate.
        optimizer: what it keeps.
    """
    layout = plan.layout
    held = [parameter for parameter in plan.parameters if any(pp in holders for _, holders in parameter.aliases)]
    count = _Count(held, layout.tp, layout.dp or 1)
    zero = layout.zero if count.dp > 1 else 0
    if zero == 0:
        return count.replicated(optimizer)
    if zero < 3:
        return count.partitioned_states(optimizer)
    return replace(count.partitioned_parameters(optimizer), gathered=most_gathered(plan, pp, held))


class _Count:
    """The parameters of a rank.

    Args:
        held: the rank's parameters.
        tp, dp: sizes of the axes.
    """

    def __init__(self, held: list[ParameterPlan], tp: int, dp: int) -> None:
        self.held, self.tp, self.dp = held, tp, dp

    def replicated(self, optimizer: OptimizerForm) -> StateBytes:
        states = 0
        for group in optimizer.groups:
            sizes = self._sizes(self._members(group))
            states += sum(sizes) * group.element_bytes + len(sizes) * group.tensor_bytes
            states += sum(_FP32 * member.local_numel(self.tp) for member in self._members(group) if member.itemsize < _FP32)
        return StateBytes(self._bytes(self.held), self._gradients(), states)

    def partitioned_states(self, optimizer: OptimizerForm) -> StateBytes:
        """Stages 1 and 2: parameters are views of one flat tensor for each group."""
        stepped, parameters, states = set[str](), 0, 0
        for group in optimizer.groups:
            members = self._members(group)
            if members:
                flat = _padded(sum(self._sizes(members)), _ALIGNMENT * self.dp)
                parameters += flat * members[0].itemsize
                states += flat // self.dp * (_FP32 + group.element_bytes) + group.tensor_bytes
                stepped |= {member.spec.name for member in members}
        others = self._bytes(parameter for parameter in self.held if parameter.spec.name not in stepped)
        return StateBytes(parameters + others, self._gradients(), states)

    def partitioned_parameters(self, optimizer: OptimizerForm) -> StateBytes:
        """Stage 3: each parameter is a part of itself."""
        parameters = sum(self._part(parameter) * parameter.itemsize for parameter in self.held)
        buffer, states = 0, 0
        for group in optimizer.groups:
            members = self._members(group)
            parts = sum(map(self._part, members))
            buffer += _FP32 * parts
            states += parts * (group.element_bytes + _FP32) + group.tensor_bytes * bool(members)
        return StateBytes(parameters, self._gradients() + buffer, states)

    def _members(self, group: GroupForm) -> list[ParameterPlan]:
        return [parameter for parameter in self.held if parameter.spec.name in group.names]

    def _sizes(self, parameters: Iterable[ParameterPlan]) -> list[int]:
        return [parameter.local_numel(self.tp) for parameter in parameters]

    def _bytes(self, parameters: Iterable[ParameterPlan]) -> int:
        return sum(parameter.local_numel(self.tp) * parameter.itemsize for parameter in parameters)

    def _gradients(self) -> int:
        return sum(p.local_numel(self.tp) * max(p.itemsize, _FP32) for p in self.held if p.requires_grad)

    def _part(self, parameter: ParameterPlan) -> int:
        return _padded(parameter.local_numel(self.tp), self.dp) // self.dp


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
