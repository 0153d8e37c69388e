"""How long a step of a candidate takes and what its ranks store: the table of its schedule replayed with the times of its stages.

A step is the pipeline; then gradients are reduced over dp; then the optimizer reads and writes its states; then weights that only
one replica has stepped are gathered. Collectives over tp wait in the forward; in the backward they travel while the weight
gradients of the layers that share them are computed. ZeRO-3 gathers a block while the one before it computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lightning_par.memory.profile import StageMemory
from lightning_par.memory.states import StateBytes, held_bytes
from lightning_par.pipeline.action import Table
from lightning_par.pipeline.simulate import Costs, Timeline, simulate
from lightning_par.plan.memory import RankMemory
from lightning_par.plan.plan import Recompute
from lightning_par.planner.anatomy import Anatomy, Body
from lightning_par.planner.candidate import Candidate
from lightning_par.planner.clock import Clock
from lightning_par.planner.cluster import Cluster
from lightning_par.planner.pipeline import Pipelines, Sizes
from lightning_par.planner.stages import (
    BlockFigures,
    Holdings,
    Weights,
    blocks_of,
    by_stage,
    cut,
    figures_of,
    gathered_ahead,
    model_states,
    stage_memory,
)
from lightning_par.planner.traffic import dp_ring, stage_link, tp_ring

_STEP_PASSES = 3  # over the elements of what is stepped: weight, gradient and states read, weight and states written


@dataclass(frozen=True)
class Estimate:
    """What is expected of a candidate.

    Attributes:
        candidate: it.
        step_seconds: of a whole step.
        parts: seconds of a step by what the slowest rank does: compute, tp, pp, bubble, dp, optimizer; they add up to the step.
        memory: of each pp coordinate.
        sent_bytes: that a rank sends in a step over each axis.
        links: for each axis whether it stays inside a node.
        flops: of a step over all devices, as the textbook counts: with causal attention counted half, and whole.
        replayed: of a pipeline its table, of the first microbatches where there are many, and its costs; None of one stage.
    """

    candidate: Candidate
    step_seconds: float
    parts: Mapping[str, float]
    memory: tuple[RankMemory, ...]
    sent_bytes: Mapping[str, float]
    links: Mapping[str, bool]
    flops: tuple[float, float]
    replayed: tuple[Table, Costs] | None = None

    @cached_property
    def most_bytes(self) -> int:
        """Of the fullest rank."""
        return max(memory.total for memory in self.memory)

    @cached_property
    def timeline(self) -> Timeline | None:
        """Of what was replayed."""
        return None if self.replayed is None else simulate(*self.replayed)

    @property
    def sample_seconds(self) -> float:
        """Of a step, for each of its samples."""
        return self.step_seconds / self.candidate.samples

    @property
    def bubble(self) -> float:
        """The part of a step for which ranks wait for one another."""
        return self.parts["bubble"] / self.step_seconds


class Estimator:
    """Estimates candidates on a cluster.

    Args:
        anatomy: of the module.
        cluster: where it is to run.
    """

    def __init__(self, anatomy: Anatomy, cluster: Cluster) -> None:
        self.anatomy, self.cluster = anatomy, cluster
        self.clock = Clock(cluster, lambda: [w for block in anatomy.body(1, False, "none").blocks for w in block.work.values()])
        self._figures: dict[tuple[int, bool, Recompute, int], BlockFigures] = {}
        self._cuts: dict[int, list[range]] = {}
        self._holdings: dict[tuple[int, bool], Holdings] = {}
        self._weights: dict[tuple[int, bool, int, int, str], list[Weights]] = {}
        self._states: dict[object, list[StateBytes]] = {}
        self._memories: dict[object, list[StageMemory]] = {}
        self._held: dict[object, int] = {}
        self._stage_costs: dict[object, Costs] = {}
        self._flops: dict[int, tuple[float, float]] = {}
        self._pipelines = Pipelines()

    def body(self, candidate: Candidate) -> Body:
        """The module, taken apart as a candidate has it."""
        return self.anatomy.body(candidate.layout.tp, candidate.layout.sp, candidate.recompute)

    def estimate(self, candidate: Candidate) -> Estimate:
        """Replay a candidate.

        Raises:
            ConfigurationError: the module cannot be split so.
        """
        layout, count = candidate.layout, candidate.layout.microbatches or 1
        cuts, figures = self.cuts(candidate), self.figures(candidate)
        costs = self._costs(candidate)
        pipeline, waited = self._replay(candidate, costs)
        most = _most(self.weights(candidate))
        dp_seconds, dp_bytes = self._reduction(candidate, most)
        optimizer = self._optimizer_seconds(candidate, most)
        step = pipeline + dp_seconds + optimizer
        busiest = max(range(layout.pp), key=lambda pp: self._busy(costs, candidate, pp))
        blocks = blocks_of(layout, cuts, busiest)
        compute = count * float(figures.compute[blocks].sum())
        busy = count * self._busy(costs, candidate, busiest)
        late = max(0.0, busy - compute)
        waits = late
        if layout.zero == 3:  # the rest is for parameters
            waits = min(late, count * float((figures.waits_forward + figures.waits_backward)[blocks].sum()))
        idle = max(0.0, pipeline - busy)
        exposed = min(waited[busiest], idle)
        parts = {
            "compute": compute, "tp": waits, "pp": exposed, "bubble": idle - exposed, "dp": dp_seconds + late - waits,
            "optimizer": optimizer,
        }  # fmt: skip
        hidden = _hidden_bytes(figures, cuts)
        num_sends = 2 * count * layout.vp if layout.pp > 1 else 0
        sent = {"tp": count * float(figures.sent_bytes[blocks].sum()), "pp": num_sends * hidden, "dp": dp_bytes}
        rings = {"tp": tp_ring(layout, self.cluster), "dp": dp_ring(layout, self.cluster)}
        links = {axis: ring.is_inside for axis, ring in rings.items()}
        links["pp"] = stage_link(layout, self.cluster) is self.cluster.inside
        replayed = None if layout.pp == 1 else (self._pipelines.table(_sizes(candidate), count), costs)
        return Estimate(candidate, step, parts, self.memory(candidate), sent, links, self._flops_of(candidate), replayed)

    def quick(self, candidate: Candidate) -> tuple[float, int]:
        """What the seconds of a step do not fall below, and the least that the fullest rank stores: to sort thousands by."""
        layout, count = candidate.layout, candidate.layout.microbatches or 1
        weights = self.weights(candidate)
        most = _most(weights)
        pipeline = self._pipelines.least_seconds(_sizes(candidate), count, self._costs(candidate))
        seconds = pipeline + self._reduction(candidate, most)[0] + self._optimizer_seconds(candidate, most)
        in_flight = min(count, layout.pp) if layout.pp > 1 else 1
        states = sum(model_states(weights[0], layout.zero, layout.dp or 1).values())
        return seconds, states + in_flight * self._held_first(candidate)

    def memory(self, candidate: Candidate) -> tuple[RankMemory, ...]:
        """What each pp coordinate stores."""
        layout = candidate.layout
        cuts, holdings = self.cuts(candidate), self.holdings(candidate)
        peaks = self._pipelines.peaks(_sizes(candidate), layout.microbatches or 1, self._stage_memories(candidate))
        found = []
        for pp, ((held, peak), states) in enumerate(zip(peaks, self.states(candidate), strict=True)):
            gathered = 0
            if layout.zero == 3:
                gathered = 2 * max(holdings.alone[b].parameter_bytes for b in blocks_of(layout, cuts, pp))
            found.append(RankMemory(states.parameters, states.gradients, states.states, held, peak - held, gathered))
        return tuple(found)

    # ------------------------------------------------------------------ kept

    def figures(self, candidate: Candidate) -> BlockFigures:
        """Of every block."""
        layout = candidate.layout
        key = layout.tp, layout.sp, candidate.recompute, candidate.rows
        if key not in self._figures:
            blocks, ring = self.body(candidate).blocks, tp_ring(layout, self.cluster)
            self._figures[key] = figures_of(blocks, candidate.rows, self.clock, ring)
        return self._figures[key]

    def cuts(self, candidate: Candidate) -> list[range]:
        """The blocks of each stage; the same for every tp."""
        num_stages = candidate.layout.num_stages
        if num_stages not in self._cuts:
            self._cuts[num_stages] = cut(self.body(candidate), num_stages)
        return self._cuts[num_stages]

    def holdings(self, candidate: Candidate) -> Holdings:
        """The parameters of each block."""
        key = candidate.layout.tp, candidate.layout.sp
        if key not in self._holdings:
            self._holdings[key] = Holdings(self.body(candidate), self.anatomy.form)
        return self._holdings[key]

    def weights(self, candidate: Candidate) -> list[Weights]:
        """The parameters of each pp coordinate."""
        layout = candidate.layout
        key = layout.tp, layout.sp, layout.pp, layout.vp, layout.placement
        if key not in self._weights:
            holdings, cuts = self.holdings(candidate), self.cuts(candidate)
            self._weights[key] = [holdings.of(blocks_of(layout, cuts, pp)) for pp in range(layout.pp)]
        return self._weights[key]

    def states(self, candidate: Candidate) -> list[StateBytes]:
        """Of each pp coordinate, to the byte."""
        layout = candidate.layout
        key = layout.tp, layout.sp, layout.pp, layout.vp, layout.placement, layout.zero, layout.dp
        if key not in self._states:
            holdings, cuts = self.holdings(candidate), self.cuts(candidate)
            held = (holdings.parameters(blocks_of(layout, cuts, pp)) for pp in range(layout.pp))
            self._states[key] = [held_bytes(parameters, layout, self.anatomy.form) for parameters in held]
        return self._states[key]

    def _stage_memories(self, candidate: Candidate) -> list[StageMemory]:
        """Of a microbatch on each stage."""
        layout, rows = candidate.layout, candidate.rows
        key = layout.tp, layout.sp, candidate.recompute, rows, layout.num_stages
        if key not in self._memories:
            blocks = self.body(candidate).blocks
            self._memories[key] = [stage_memory([blocks[b] for b in stage], rows) for stage in self.cuts(candidate)]
        return self._memories[key]

    def _held_first(self, candidate: Candidate) -> int:
        """What a microbatch leaves on the first rank."""
        layout, rows = candidate.layout, candidate.rows
        key = layout.tp, layout.sp, candidate.recompute, rows, layout.pp, layout.vp, layout.placement
        if key not in self._held:
            first = blocks_of(layout, self.cuts(candidate), 0)
            self._held[key] = int(self.figures(candidate).held_bytes[first].sum())
        return self._held[key]

    # ------------------------------------------------------------------ seconds

    def _costs(self, candidate: Candidate) -> Costs:
        """Of each stage."""
        layout = candidate.layout
        replicas = layout.dp if layout.zero == 3 else None
        where = layout.world_size <= self.cluster.devices_per_node
        key = (
            layout.tp,
            layout.sp,
            candidate.recompute,
            candidate.rows,
            layout.num_stages,
            replicas,
            candidate.splits_backward,
            where,
        )
        if key not in self._stage_costs:
            self._stage_costs[key] = self._find_costs(candidate)
        return self._stage_costs[key]

    def _find_costs(self, candidate: Candidate) -> Costs:
        layout = candidate.layout
        cuts, figures = self.cuts(candidate), self.figures(candidate)
        gathers = np.zeros(len(figures.forward))
        if layout.zero == 3:
            ring, sizes = dp_ring(layout, self.cluster), [each.parameter_bytes for each in self.holdings(candidate).alone]
            seconds = {size: ring.seconds("all_gather", size) for size in set(sizes)}
            gathers = np.array([seconds[size] for size in sizes])
        forward = gathered_ahead(figures.forward + figures.waits_forward, gathers, cuts)
        backwards = figures.input_gradient + figures.weight_gradient + figures.waits(candidate.splits_backward)
        weights = by_stage(figures.weight_gradient, cuts)
        inputs = gathered_ahead(backwards, gathers, cuts, backward=True) - weights
        transfer = stage_link(layout, self.cluster).seconds(_hidden_bytes(figures, cuts)) if layout.pp > 1 else 0.0
        return Costs(tuple(forward.tolist()), tuple(inputs.tolist()), tuple(weights.tolist()), transfer)

    def _busy(self, costs: Costs, candidate: Candidate, pp: int) -> float:
        """Seconds of a rank with one microbatch."""
        stages = candidate.layout.stages_of(pp)
        return sum(costs.forward[s] + costs.input_gradient[s] + costs.weight_gradient[s] for s in stages)

    def _replay(self, candidate: Candidate, costs: Costs) -> tuple[float, Sequence[float]]:
        """Seconds of the pipeline, and of each rank how long it waits for what travels."""
        count = candidate.layout.microbatches or 1
        if candidate.layout.pp == 1:
            return count * self._busy(costs, candidate, 0), (0.0,)
        pace = self._pipelines.pace(_sizes(candidate), count, costs)
        return pace.makespan_seconds, pace.exposed_transfer_seconds

    def _reduction(self, candidate: Candidate, weights: Weights) -> tuple[float, float]:
        """Seconds after the backward, and bytes that a rank sends in a step, over dp."""
        layout, ring = candidate.layout, dp_ring(candidate.layout, self.cluster)
        if ring.size == 1:
            return 0.0, 0.0
        gradients, parameters = 4.0 * weights.trained, float(weights.parameter_bytes)
        if layout.zero == 0:
            return ring.seconds("all_reduce", gradients), ring.sent_bytes("all_reduce", gradients)
        sent = ring.sent_bytes("reduce_scatter", gradients)
        if layout.zero == 3:  # gathered for each forward and each backward, see `gathered_ahead`
            seconds = ring.seconds("reduce_scatter", gradients)
            return seconds, sent + 2 * (layout.microbatches or 1) * ring.sent_bytes("all_gather", parameters)
        seconds = ring.size * ring.seconds("reduce", gradients / ring.size)  # DeepSpeed's: to one rank after the other
        return seconds + ring.seconds("all_gather", parameters), sent + ring.sent_bytes("all_gather", parameters)

    def _optimizer_seconds(self, candidate: Candidate, weights: Weights) -> float:
        states = model_states(weights, candidate.layout.zero, candidate.layout.dp or 1)["states"]
        return _STEP_PASSES * states / self.cluster.device.memory_bandwidth

    def _flops_of(self, candidate: Candidate) -> tuple[float, float]:
        """Of a step: three times the forward of every sample, as one device would compute it."""
        rows = candidate.rows
        if rows not in self._flops:
            pairs = [block.work["F"].flops(rows) for block in self.anatomy.body(1, False, "none").blocks]
            self._flops[rows] = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        causal, whole = self._flops[rows]
        scale = 3 * (candidate.layout.microbatches or 1) * (candidate.layout.dp or 1)
        return scale * causal, scale * whole


def _hidden_bytes(figures: BlockFigures, cuts: Sequence[range]) -> float:
    """The most that a stage sends to the next one."""
    return float(figures.hidden_bytes[[stage[-1] for stage in cuts[:-1]]].max(initial=0.0))


def _most(weights: Sequence[Weights]) -> Weights:
    """Of the rank that steps most."""
    return max(weights, key=lambda each: each.trained)


def _sizes(candidate: Candidate) -> Sizes:
    return candidate.schedule, candidate.layout.pp, candidate.layout.vp
