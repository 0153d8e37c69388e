"""How long a step of a candidate takes and what its ranks store: the table of its schedule replayed with the times of its stages.

A step is the pipeline; then gradients are reduced over dp; then the optimizer reads and writes its states; then weights that only
one replica has stepped are gathered. Collectives over tp wait in the forward; in the backward they travel while the weight
gradients of the layers that share them are computed. ZeRO-3 gathers a block while the one before it computes.

Of many microbatches the middle ones repeat: the table is replayed with a few and with a few more, and the rest follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lightning_par.memory.forecast import peak_bytes
from lightning_par.memory.states import StateBytes, held_bytes
from lightning_par.pipeline.schedules import build_schedule
from lightning_par.pipeline.simulate import Costs, Timeline, simulate
from lightning_par.plan.memory import RankMemory
from lightning_par.plan.plan import Recompute
from lightning_par.planner.anatomy import Anatomy, Body
from lightning_par.planner.candidate import Candidate
from lightning_par.planner.cluster import Cluster
from lightning_par.planner.stages import BlockTime, Holdings, Weights, blocks_of, cut, model_states, stage_memory, time_block
from lightning_par.planner.traffic import dp_ring, stage_link, tp_ring

_STEP_PASSES = 3  # over the elements of what is stepped: weight, gradient and states read, weight and states written
_ROUNDS = 2  # replayed are so many microbatches for each rank


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
        timeline: of the pipeline; None of one stage. Where there are many microbatches, of the first ones.
    """

    candidate: Candidate
    step_seconds: float
    parts: Mapping[str, float]
    memory: tuple[RankMemory, ...]
    sent_bytes: Mapping[str, float]
    links: Mapping[str, bool]
    flops: tuple[float, float]
    timeline: Timeline | None = None

    @cached_property
    def most_bytes(self) -> int:
        """Of the fullest rank."""
        return max(memory.total for memory in self.memory)

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
        self._times: dict[tuple[int, bool, Recompute, int], list[BlockTime]] = {}
        self._cuts: dict[tuple[int, bool, int], list[range]] = {}
        self._holdings: dict[tuple[int, bool], Holdings] = {}
        self._weights: dict[tuple[int, bool, int, int, str], list[Weights]] = {}
        self._states: dict[object, list[StateBytes]] = {}
        self._stage_costs: dict[object, Costs] = {}

    def body(self, candidate: Candidate) -> Body:
        """The module, taken apart as a candidate has it."""
        return self.anatomy.body(candidate.layout.tp, candidate.layout.sp, candidate.recompute)

    def estimate(self, candidate: Candidate) -> Estimate:
        """Replay a candidate.

        Raises:
            ConfigurationError: the module cannot be split so.
        """
        layout, rows, count = candidate.layout, candidate.rows, candidate.layout.microbatches or 1
        cuts, times = self.cuts(candidate), self.times(candidate)
        costs = self._costs(candidate)
        pipeline, timeline = self._replay(candidate, costs)
        weights = self.weights(candidate)
        most = max(weights, key=lambda each: each.trained)
        dp_seconds, dp_bytes = self._reduction(candidate, most)
        optimizer = self._optimizer_seconds(candidate, most)
        step = pipeline + dp_seconds + optimizer
        busiest = max(range(layout.pp), key=lambda pp: self._busy(costs, candidate, pp))
        blocks = blocks_of(layout, cuts, busiest)
        compute = count * sum(times[b].forward + times[b].input_gradient + times[b].weight_gradient for b in blocks)
        busy = count * self._busy(costs, candidate, busiest)
        late = max(0.0, busy - compute)
        waits = late
        if layout.zero == 3:  # the rest is for parameters
            waits = min(late, count * sum(times[b].waits_forward + times[b].waits_backward for b in blocks))
        exposed = timeline.exposed_transfer_seconds[busiest] if timeline is not None else 0.0
        idle = max(0.0, pipeline - busy)
        parts = {
            "compute": compute, "tp": waits, "pp": min(exposed, idle), "bubble": idle - min(exposed, idle),
            "dp": dp_seconds + late - waits, "optimizer": optimizer,
        }  # fmt: skip
        body = self.body(candidate)
        hidden = max((body.blocks[stage[-1]].sent(rows) for stage in cuts[:-1]), default=0.0)
        num_sends = 2 * count * layout.vp if layout.pp > 1 else 0
        sent = {"tp": count * sum(times[b].sent_bytes for b in blocks), "pp": num_sends * hidden, "dp": dp_bytes}
        rings = {"tp": tp_ring(layout, self.cluster), "dp": dp_ring(layout, self.cluster)}
        links = {axis: ring.is_inside for axis, ring in rings.items()}
        links["pp"] = stage_link(layout, self.cluster) is self.cluster.inside
        return Estimate(candidate, step, parts, self.memory(candidate), sent, links, self._flops(candidate), timeline)

    def quick(self, candidate: Candidate) -> tuple[float, int]:
        """About the seconds of a step, and the least that the fullest rank stores: in microseconds, to sort thousands by."""
        layout, count = candidate.layout, candidate.layout.microbatches or 1
        cuts, costs = self.cuts(candidate), self._costs(candidate)
        per_rank = max(self._busy(costs, candidate, pp) for pp in {0, layout.pp - 1})
        weights = self.weights(candidate)
        idle = (layout.pp - 1) / layout.vp * (per_rank if not candidate.splits_backward else per_rank / 3)
        dp_seconds, _ = self._reduction(candidate, weights[0])
        seconds = count * per_rank + idle + dp_seconds + self._optimizer_seconds(candidate, weights[0])
        in_flight = min(count, layout.pp) if layout.pp > 1 else 1
        body = self.body(candidate)
        held = sum(body.blocks[b].stored("F", candidate.rows).after for b in blocks_of(layout, cuts, 0))
        states = sum(model_states(weights[0], layout.zero, layout.dp or 1).values())
        return seconds, states + in_flight * held

    def memory(self, candidate: Candidate) -> tuple[RankMemory, ...]:
        """What each pp coordinate stores."""
        layout, rows = candidate.layout, candidate.rows
        body, cuts = self.body(candidate), self.cuts(candidate)
        stages = [stage_memory([body.blocks[b] for b in blocks], rows) for blocks in cuts]
        table = build_schedule(candidate.schedule, layout.pp, layout.vp, self._few(candidate))
        found = []
        for pp, (row, states) in enumerate(zip(table, self.states(candidate), strict=True)):
            held, peak = peak_bytes(row, stages)
            gathered = 0
            if layout.zero == 3:
                gathered = 2 * max(self.holdings(candidate).of([b]).parameter_bytes for b in blocks_of(layout, cuts, pp))
            found.append(RankMemory(states.parameters, states.gradients, states.states, held, peak - held, gathered))
        return tuple(found)

    # ------------------------------------------------------------------ kept

    def times(self, candidate: Candidate) -> list[BlockTime]:
        """Of every block."""
        layout = candidate.layout
        key = layout.tp, layout.sp, candidate.recompute, candidate.rows
        if key not in self._times:
            ring, known = tp_ring(layout, self.cluster), dict[int, BlockTime]()
            for block in self.body(candidate).blocks:
                if id(block) not in known:
                    known[id(block)] = time_block(block, candidate.rows, self.cluster.device, ring)
            self._times[key] = [known[id(block)] for block in self.body(candidate).blocks]
        return self._times[key]

    def cuts(self, candidate: Candidate) -> list[range]:
        """The blocks of each stage."""
        layout = candidate.layout
        key = layout.tp, layout.sp, layout.num_stages
        if key not in self._cuts:
            self._cuts[key] = cut(self.body(candidate), layout.num_stages)
        return self._cuts[key]

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
        layout, body = candidate.layout, self.body(candidate)
        cuts, times = self.cuts(candidate), self.times(candidate)
        gathers = [0.0] * len(times)
        if layout.zero == 3:
            ring, holdings = dp_ring(layout, self.cluster), self.holdings(candidate)
            gathers = [ring.seconds("all_gather", holdings.of([b]).parameter_bytes) for b in range(len(times))]
        forward, inputs, weights = [], [], []
        for blocks in cuts:
            forwards = [times[b].forward + times[b].waits_forward for b in blocks]
            weights.append(sum(times[b].weight_gradient for b in blocks))
            backwards = [
                times[b].input_gradient + times[b].weight_gradient + times[b].waits(candidate.splits_backward) for b in blocks
            ]
            own = [gathers[b] for b in blocks]
            forward.append(gathered_ahead(forwards, own))
            inputs.append(gathered_ahead(backwards[::-1], own[::-1]) - weights[-1])
        hidden = max((body.blocks[stage[-1]].sent(candidate.rows) for stage in cuts[:-1]), default=0.0)
        transfer = stage_link(layout, self.cluster).seconds(hidden) if layout.pp > 1 else 0.0
        return Costs(forward, inputs, weights, transfer)

    def _busy(self, costs: Costs, candidate: Candidate, pp: int) -> float:
        """Seconds of a rank with one microbatch."""
        stages = candidate.layout.stages_of(pp)
        return sum(costs.forward[s] + costs.input_gradient[s] + costs.weight_gradient[s] for s in stages)

    def _few(self, candidate: Candidate) -> int:
        """Microbatches that are replayed: a multiple of the ranks, or all."""
        layout = candidate.layout
        return min(layout.microbatches or 1, _ROUNDS * layout.pp)

    def _replay(self, candidate: Candidate, costs: Costs) -> tuple[float, Timeline | None]:
        layout, count = candidate.layout, candidate.layout.microbatches or 1
        if layout.pp == 1:
            return count * self._busy(costs, candidate, 0), None
        few = self._few(candidate)
        timeline = simulate(build_schedule(candidate.schedule, layout.pp, layout.vp, few), costs)
        seconds = timeline.makespan_seconds
        if few < count:  # a period of the middle
            period = layout.pp if layout.vp > 1 else 1
            more = simulate(build_schedule(candidate.schedule, layout.pp, layout.vp, few + period), costs)
            seconds += (more.makespan_seconds - seconds) / period * (count - few)
        return seconds, timeline

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

    def _flops(self, candidate: Candidate) -> tuple[float, float]:
        """Of a step: three times the forward of every sample, as one device would compute it."""
        alone = self.anatomy.body(1, False, "none")
        pairs = [block.work["F"].flops(candidate.rows) for block in alone.blocks]
        scale = 3 * candidate.samples / candidate.rows
        return scale * sum(pair[0] for pair in pairs), scale * sum(pair[1] for pair in pairs)


def gathered_ahead(computes: Sequence[float], gathers: Sequence[float]) -> float:
    """Seconds of blocks of which each is gathered while the one before it computes; nothing computes before the first is there.

    Args:
        computes: seconds of each block, in the order in which they run.
        gathers: of its parameters.
    """
    return gathers[0] + sum(max(each, coming) for each, coming in zip(computes, [*gathers[1:], 0.0], strict=True))
