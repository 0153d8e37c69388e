"""The blocks of a body put together to stages: what a stage computes, stores and holds, for one mesh and one size of microbatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from lightning_par.layout import Layout
from lightning_par.memory.optimizer import OptimizerForm
from lightning_par.memory.profile import ActionMemory, StageMemory
from lightning_par.pipeline.action import Kind
from lightning_par.plan.partition import partition_blocks
from lightning_par.plan.plan import ParameterPlan
from lightning_par.planner.anatomy import Block, Body
from lightning_par.planner.clock import Clock
from lightning_par.planner.traffic import Ring

_KINDS: tuple[Kind, ...] = ("F", "I", "W")
_BACKWARDS: tuple[Kind, ...] = ("B", "I", "W")


@dataclass(frozen=True)
class BlockTime:
    """Seconds of one block with one microbatch on a tp rank.

    Attributes:
        forward, input_gradient, weight_gradient: of computation.
        waits_forward, waits_input_gradient: that it waits for collectives over tp.
        waits_backward: the same of a backward that is not split: weight gradients are computed meanwhile.
        sent_bytes: that the rank sends over tp, forward and backward.
    """

    forward: float
    input_gradient: float
    weight_gradient: float
    waits_forward: float
    waits_input_gradient: float
    waits_backward: float
    sent_bytes: float

    def waits(self, splits_backward: bool) -> float:
        """Of a backward, in halves or not."""
        return self.waits_input_gradient if splits_backward else self.waits_backward


def time_block(block: Block, rows: int, clock: Clock, ring: Ring) -> BlockTime:
    """How long a block takes."""
    work, device = block.work, clock.device
    sent = [each for kind in _KINDS for each in work[kind].sent(rows)]
    paces = {kind: clock.pace(work[kind], rows) for kind in _KINDS}
    forward, input_gradient, weight_gradient = (pace * work[kind].seconds(rows, device) for kind, pace in paces.items())
    paces["B"] = paces["I"]
    waits = {kind: each.waits(rows, device, ring.seconds, paces[kind]) for kind, each in work.items()}
    split = waits["I"] + waits["W"]
    return BlockTime(
        forward,
        input_gradient,
        weight_gradient,
        waits["F"],
        split,
        waits.get("B", split),
        sum(ring.sent_bytes(*each) for each in sent),
    )


def cut(body: Body, num_stages: int) -> list[range]:
    """The blocks of each stage, as `lightning_par.plan.cut` has them: by the floating-point operations of the dry run."""
    if num_stages == 1:
        return [range(len(body.blocks))]
    counts = _partition(tuple(stage.flops for stage in body.plan.stages), num_stages)
    ends = list(accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


@cache
def _partition(flops: tuple[int, ...], num_stages: int) -> list[int]:
    """The same for every tp, and dear for many blocks."""
    return partition_blocks(flops, num_stages)


def stage_memory(blocks: Sequence[Block], rows: int) -> StageMemory:
    """What one microbatch stores on a stage: blocks run in order, backwards in the opposite one."""

    def stored(kind: Kind) -> list[ActionMemory]:
        first, *others = blocks
        return [first.stored(kind, rows), *(_beside(block.stored(kind, rows), kind, block.shared(rows)) for block in others)]

    backwards: StageMemory = {kind: _chained(stored(kind)[::-1]) for kind in _BACKWARDS}
    return {"F": _chained(stored("F")), **backwards}


def _beside(memory: ActionMemory, kind: Kind, shared: int) -> ActionMemory:
    """The same of a block whose stage has a block before it, which stores what they share."""
    if kind == "W":  # the graph has gone, and what it has saved
        return memory
    before, after = (0, shared) if kind == "F" else (shared, 0)
    return ActionMemory(memory.before - before, memory.after - after, memory.peak - shared)


def _chained(actions: Sequence[ActionMemory]) -> ActionMemory:
    """One after the other: what those to come have stored is there, and so is what those before have left."""
    held = before = sum(action.before for action in actions)
    peak = held
    for action in actions:
        peak = max(peak, held + action.peak - action.before)
        held += action.after - action.before
    return ActionMemory(before, held, peak)


@dataclass(frozen=True)
class Weights:
    """The parameters of some blocks on one tp rank.

    Attributes:
        elements: of all of them.
        trained: of those that are trained.
        parameter_bytes: as the forward has them.
        gradient_bytes: in at least float32.
        state_bytes: of the optimizer, without masters.
        master_bytes: float32 copies of trained half-precision ones.
    """

    elements: int = 0
    trained: int = 0
    parameter_bytes: int = 0
    gradient_bytes: int = 0
    state_bytes: int = 0
    master_bytes: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class Holdings:
    """The parameters of a body by block; one that several blocks use is held once by a rank.

    Args:
        body: the module over tp.
        form: what the optimizer keeps.
    """

    def __init__(self, body: Body, form: OptimizerForm) -> None:
        kept = {name: group.element_bytes for group in form.groups for name in group.names}
        count = len(body.blocks)
        self._own = [Weights()] * count
        self._shared: list[tuple[frozenset[int], Weights]] = []
        self._parameters: list[list[ParameterPlan]] = [[] for _ in range(count)]
        for parameter in body.plan.parameters:
            holders = frozenset(block for _, blocks in parameter.aliases for block in blocks) if count > 1 else frozenset([0])
            for block in holders:
                self._parameters[block].append(parameter)
            weights = _weights(
                parameter.local_numel(body.plan.layout.tp),
                parameter.itemsize,
                parameter.requires_grad,
                kept.get(parameter.spec.name, 0),
            )
            if len(holders) == 1:
                block = next(iter(holders))
                self._own[block] += weights
            else:
                self._shared.append((holders, weights))

    def of(self, blocks: Sequence[int]) -> Weights:
        """Of a rank with some blocks."""
        there = set(blocks)
        total = sum((self._own[block] for block in blocks), Weights())
        return sum((weights for holders, weights in self._shared if holders & there), total)

    def parameters(self, blocks: Sequence[int]) -> list[ParameterPlan]:
        """Of a rank with some blocks, each once."""
        return list({parameter.spec.name: parameter for block in blocks for parameter in self._parameters[block]}.values())


def _weights(elements: int, itemsize: int, is_trained: bool, kept: int) -> Weights:
    trained = elements if is_trained else 0
    masters = 4 * trained if itemsize < 4 else 0
    return Weights(elements, trained, elements * itemsize, trained * max(itemsize, 4), trained * kept, masters)


def model_states(weights: Weights, zero: int, dp: int) -> Mapping[str, int]:
    """About the bytes of parameters, gradients and optimizer states on a rank: `lightning_par.memory.states` without padding."""
    masters = 4 * weights.trained if zero else weights.master_bytes
    states = (weights.state_bytes + masters) // (dp if zero else 1)
    gradients = weights.gradient_bytes + (4 * weights.trained // dp if zero == 3 else 0)
    return {"parameters": weights.parameter_bytes // (dp if zero == 3 else 1), "gradients": gradients, "states": states}


def blocks_of(layout: Layout, cuts: Sequence[range], pp: int) -> list[int]:
    """The blocks at a pp coordinate."""
    return [block for stage in layout.stages_of(pp) for block in cuts[stage]]
