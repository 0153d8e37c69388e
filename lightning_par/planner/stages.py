"""The blocks of a body put together to stages: what a stage computes, stores and holds, for one mesh and one size of microbatch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np

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
class BlockFigures:
    """What every block does with one microbatch on a tp rank, each an array by block.

    Attributes:
        forward, input_gradient, weight_gradient: seconds of computation.
        waits_forward, waits_input_gradient: seconds for which it waits for collectives over tp.
        waits_backward: the same of a backward that is not split: weight gradients are computed meanwhile.
        sent_bytes: that the rank sends over tp, forward and backward.
        held_bytes: that a forward leaves for the backward, without what other blocks of the stage store too.
        hidden_bytes: that go to the next block.
    """

    forward: np.ndarray
    input_gradient: np.ndarray
    weight_gradient: np.ndarray
    waits_forward: np.ndarray
    waits_input_gradient: np.ndarray
    waits_backward: np.ndarray
    sent_bytes: np.ndarray
    held_bytes: np.ndarray
    hidden_bytes: np.ndarray

    @property
    def compute(self) -> np.ndarray:
        """Seconds of all computation."""
        return self.forward + self.input_gradient + self.weight_gradient

    def waits(self, splits_backward: bool) -> np.ndarray:
        """Of a backward, in halves or not."""
        return self.waits_input_gradient if splits_backward else self.waits_backward


def figures_of(blocks: Sequence[Block], rows: int, clock: Clock, ring: Ring) -> BlockFigures:
    """What blocks do; equal ones are asked once."""
    known = {id(block): block for block in blocks}
    found = {key: _figures(block, rows, clock, ring) for key, block in known.items()}
    return BlockFigures(*np.array([found[id(block)] for block in blocks]).T)


def _figures(block: Block, rows: int, clock: Clock, ring: Ring) -> tuple[float, ...]:
    work, device = block.work, clock.device
    paces = {kind: clock.pace(work[kind], rows) for kind in _KINDS}
    computed = [pace * work[kind].seconds(rows, device) for kind, pace in paces.items()]
    paces["B"] = paces["I"]
    waits = {kind: each.waits(rows, device, ring.seconds, paces[kind]) for kind, each in work.items()}
    split = waits["I"] + waits["W"]
    sent_bytes = sum(ring.sent_bytes(*each) for kind in _KINDS for each in work[kind].sent(rows))
    held = block.stored("F", rows).after - block.shared(rows)
    return *computed, waits["F"], split, waits.get("B", split), sent_bytes, held, block.sent(rows)


def by_stage(of_blocks: np.ndarray, cuts: Sequence[range]) -> np.ndarray:
    """The sum of each stage's blocks."""
    sums: np.ndarray = np.add.reduceat(of_blocks, [stage.start for stage in cuts])
    return sums


def gathered_ahead(computes: np.ndarray, gathers: np.ndarray, cuts: Sequence[range], backward: bool = False) -> np.ndarray:
    """Seconds of stages: each block is gathered while the one before it computes; nothing computes before the first is there.

    Args:
        computes: seconds of each block.
        gathers: of its parameters.
        cuts: the blocks of each stage.
        backward: whether they run in the opposite order.
    """
    firsts, lasts = [stage[0] for stage in cuts], [stage[-1] for stage in cuts]
    if backward:
        firsts, lasts = lasts, firsts
    coming = np.roll(gathers, 1 if backward else -1)
    coming[lasts] = 0.0
    return gathers[firsts] + by_stage(np.maximum(computes, coming), cuts)


def cut(body: Body, num_stages: int) -> list[range]:
    """The blocks of each stage, as `lightning_par.plan.cut` has them: by the floating-point operations of the dry run."""
    if num_stages == 1:
        return [range(len(body.blocks))]
    ends = list(accumulate(counts := partition_blocks(body.flops, num_stages)))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


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


class Weights(NamedTuple):
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


class Holdings:
    """The parameters of a body by block; one that several blocks use is held once by a rank.

    Args:
        body: the module over tp.
        form: what the optimizer keeps.
    """

    def __init__(self, body: Body, form: OptimizerForm) -> None:
        kept = {name: group.element_bytes for group in form.groups for name in group.names}
        count = len(body.blocks)
        own: list[list[Weights]] = [[] for _ in range(count)]
        self._shared: list[tuple[frozenset[int], Weights]] = []
        self._parameters: list[list[ParameterPlan]] = [[] for _ in range(count)]
        for parameter in body.parameters:
            holders = frozenset(block for _, blocks in parameter.aliases for block in blocks) if count > 1 else frozenset([0])
            for block in holders:
                self._parameters[block].append(parameter)
            weights = _weights(
                parameter.local_numel(body.tp),
                parameter.itemsize,
                parameter.requires_grad,
                kept.get(parameter.spec.name, 0),
            )
            if len(holders) == 1:
                own[next(iter(holders))].append(weights)
            else:
                self._shared.append((holders, weights))
        self._own = [_total(each) for each in own]

    def of(self, blocks: Sequence[int]) -> Weights:
        """Of a rank with some blocks."""
        shared = [weights for holders, weights in self._shared if not holders.isdisjoint(blocks)]
        return _total([*(self._own[block] for block in blocks), *shared])

    def parameters(self, blocks: Sequence[int]) -> list[ParameterPlan]:
        """Of a rank with some blocks, each once."""
        return list({parameter.spec.name: parameter for block in blocks for parameter in self._parameters[block]}.values())

    @cached_property
    def alone(self) -> list[Weights]:
        """Of a rank with each block alone."""
        return [self.of([block]) for block in range(len(self._own))]


def _total(each: Iterable[Weights]) -> Weights:
    return Weights(*map(sum, zip(*each, strict=True)))


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
