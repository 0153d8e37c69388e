"""What one decoder layer costs a rank for one microbatch: counted, and by the formula of Megatron.

batch b, sequence s, width h, e bytes per element, tp size t
bytes sent per layer and microbatch     8 b s h e (t-1)/t
tensor parallel (arXiv 1909.08053)      2 all-reduces forward, 2 backward, each 2 b s h e (t-1)/t
sequence parallel (arXiv 2205.05198)    2 all-gathers and 2 reduce-scatters each way, each b s h e (t-1)/t
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.counting import CollectiveCounter, ring_bytes
from benchmarks.llama import BATCH, LENGTH, WIDTH, compute_truth, make_llama, make_tokens
from benchmarks.systems import System

# Models of these depths differ by one layer: embedding, head and loss cancel. Ours splits a chain, so it needs two blocks.
DEPTHS = (2, 3, 4)
ELEMENT_BYTES = 4  # fp32


@dataclass(frozen=True)
class LayerTraffic:
    """What one decoder layer costs a rank for one microbatch.

    Attributes:
        forward: collectives by kind.
        backward: collectives by kind.
        sent_bytes: what the rank sends in both, by the ring formula.
    """

    forward: Mapping[str, int]
    backward: Mapping[str, int]
    sent_bytes: int

    @property
    def num_calls(self) -> int:
        """Collectives in both."""
        return sum(self.forward.values()) + sum(self.backward.values())

    def __str__(self) -> str:
        return f"{listed(self.forward)} forward, {listed(self.backward)} backward, {self.sent_bytes:,} bytes"


@dataclass(frozen=True)
class Row:
    """One system in one setting.

    Attributes:
        system: its name.
        tp: ranks.
        kv_heads: key and value heads of the model.
        counted: what it costs.
        expected: what the formula says.
        is_ours: whether the two must be equal.
    """

    system: str
    tp: int
    kv_heads: int
    counted: LayerTraffic
    expected: LayerTraffic
    is_ours: bool


def listed(calls: Mapping[str, int]) -> str:
    """Such as ``2 all-gather, 2 reduce-scatter``."""
    return ", ".join(f"{count} {kind}" for kind, count in calls.items()) or "nothing"


def expected_traffic(tp: int, is_sequence_parallel: bool) -> LayerTraffic:
    """The formula at the top of this file, for the model of `benchmarks.llama`."""
    kinds = ("all-gather", "reduce-scatter") if is_sequence_parallel else ("all-reduce",)
    activation = BATCH * LENGTH * WIDTH * ELEMENT_BYTES
    each_way = dict.fromkeys(kinds, 2)
    return LayerTraffic(each_way, each_way, 4 * sum(ring_bytes(kind, activation, tp) for kind in kinds))


def differences(rows: Iterable[Row]) -> list[str]:
    """One line for each row of lightning_par that is not what the formula says."""
    return [
        f"{row.system}, tp{row.tp}, {row.kv_heads} key and value heads: counted {row.counted}; the formula says {row.expected}"
        for row in rows
        if row.is_ours and row.counted != row.expected
    ]


def measure_rank(
    rank: int, tp: int, systems: Sequence[System], all_kv_heads: Sequence[int], report: Callable[[str], None]
) -> list[Row]:
    """Count every system on this rank; the losses and gradients of each must be those of one process. Collective over all ranks.

    Args:
        rank: of this process.
        tp: number of ranks.
        systems: what to count.
        all_kv_heads: numbers of key and value heads to count them with.
        report: is told on rank 0 what is being counted.

    Raises:
        ValueError: a system computes something else than one process, or layers differ in what they cost.
    """
    warnings.simplefilter("ignore")  # deprecations inside the other systems
    rows = []
    for kv_heads in all_kv_heads:
        for system in systems:
            if rank == 0:
                report(f"tp{tp}, {kv_heads} key and value heads: {system.name}")
            counted = _layer_traffic(system, rank, tp, kv_heads)
            expected = expected_traffic(tp, system.is_sequence_parallel)
            rows.append(Row(system.name, tp, kv_heads, counted, expected, system.is_ours))
    return rows


def _layer_traffic(system: System, rank: int, tp: int, kv_heads: int) -> LayerTraffic:
    models = [_count_model(system, rank, tp, depth, kv_heads) for depth in DEPTHS]
    first, second = (_difference(*pair) for pair in zip(models[1:], models, strict=False))
    if first != second:
        raise ValueError(f"{system.name}: layer {DEPTHS[1]} costs {first}; layer {DEPTHS[2]} costs {second}: no cost per layer")
    return first


def _count_model(system: System, rank: int, tp: int, depth: int, kv_heads: int) -> tuple[CollectiveCounter, CollectiveCounter]:
    """Forward and backward of one microbatch of the whole model."""
    truth, model = compute_truth(depth, kv_heads), make_llama(depth, kv_heads)
    step = system.install(model, tp)
    with CollectiveCounter() as forward:
        loss = step.forward(make_tokens())
    with CollectiveCounter() as backward:
        step.backward(loss)
    step.finish()
    try:
        truth.check(loss, model, rank, tp)
    except ValueError as error:
        raise ValueError(f"{system.name} with {depth} layers over {tp} ranks: {error}") from None
    return forward, backward


def _difference(
    deep: tuple[CollectiveCounter, CollectiveCounter], shallow: tuple[CollectiveCounter, CollectiveCounter]
) -> LayerTraffic:
    forward, backward = (_minus(more.calls, less.calls) for more, less in zip(deep, shallow, strict=True))
    sent = (sum(counter.sent_bytes.total() for counter in counters) for counters in (deep, shallow))
    return LayerTraffic(forward, backward, next(sent) - next(sent))


def _minus(more: Counter[str], less: Counter[str]) -> dict[str, int]:
    """The difference by kind, without those that are 0."""
    return {kind: more[kind] - less[kind] for kind in sorted(more | less) if more[kind] != less[kind]}
