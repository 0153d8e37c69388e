"""Searches timed: the model taken apart, and the layouts of a cluster searched when that is done.

Both run on one core, whose own seconds are counted: what else the machine does is not in them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.command import report
from benchmarks.published_forecast import h100_nodes, take_apart
from lightning_par.errors import ConfigurationError
from lightning_par.planner import Anatomy, Cluster, search

_LENGTH, _REPEATS = 8192, 5
SIZES = ((4, 512), (128, 1024), (2048, 2048))  # nodes of 8, samples of a step
MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("1.3B", {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
              "num_key_value_heads": 16, "vocab_size": 32_000}),
    ("70B", {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
             "num_key_value_heads": 8, "vocab_size": 128_256}),
    ("405B", {"hidden_size": 16_384, "intermediate_size": 53_248, "num_hidden_layers": 126, "num_attention_heads": 128,
              "num_key_value_heads": 8, "vocab_size": 128_256}),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One model on one cluster.

    Attributes:
        model: its name.
        num_devices: of the cluster.
        batch: samples of a step.
        analysis_seconds: to take the model apart as far as this cluster needs, after those of the rows before.
        search_seconds: of a search, the model taken apart.
        num_considered: ways that divide and fit.
        best: what to type; empty where nothing fits.
    """

    model: str
    num_devices: int
    batch: int
    analysis_seconds: float
    search_seconds: float
    num_considered: int
    best: str


def time_searches(models: Sequence[tuple[str, dict[str, Any]]], sizes: Sequence[tuple[int, int]]) -> list[Row]:
    """Time them; progress goes to stderr."""
    rows = []
    for name, config in models:
        report(f"{name}: taking it apart")
        start = time.process_time()
        anatomy = take_apart("llama", {**config, "max_position_embeddings": _LENGTH}, _LENGTH)
        made = time.process_time() - start
        for nodes, batch in sizes:
            rows.append(_time(anatomy, h100_nodes(nodes), batch, name, made))
            made = 0.0
            report(f"{name} on {rows[-1].num_devices:,} devices: {rows[-1].search_seconds:.2f} s")
    return rows


def _time(anatomy: Anatomy, cluster: Cluster, batch: int, name: str, made: float) -> Row:
    first, considered, best = _search(anatomy, cluster, batch)
    known = statistics.median(_search(anatomy, cluster, batch)[0] for _ in range(_REPEATS))
    return Row(name, cluster.num_devices, batch, made + max(0.0, first - known), known, considered, best)


def _search(anatomy: Anatomy, cluster: Cluster, batch: int) -> tuple[float, int, str]:
    """Seconds, ways that fit, and the best of them."""
    start = time.process_time()
    try:
        outlook = search(anatomy, cluster, batch)
    except ConfigurationError:  # nothing fits
        return time.process_time() - start, 0, ""
    return time.process_time() - start, outlook.num_considered, outlook.best[0].candidate.words
