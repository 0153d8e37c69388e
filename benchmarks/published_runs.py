"""Runs that others have published, with everything that a forecast of them needs.

- Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM" (SC21, arXiv 2104.04473),
  table 1: GPTs on A100 of 80 GB, sequences of 2,048, a vocabulary of 51,200, in half precision, everything recomputed,
  interleaved; operations of a device in a second, which its equation 3 makes of the seconds of a step. It says neither the samples
  of a microbatch nor the stages of a rank: the forecast is of those that it finds quickest and that fit.
- Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), tables 3 and 5: GPTs on
  A100 of 80 GB, tp8, sequences of 2,048, a vocabulary of 51,200, in half precision; seconds of an iteration.
- torchtitan, "Llama 3.1 on H100", December 2024: FSDP2 without torch.compile, sequences of 8,192, selective activation
  checkpointing; tokens of a device in a second. Its H100 have 96 GB HBM2e of 2.4 TB/s and 500 W.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_par.layout import Layout
from lightning_par.plan.plan import Recompute

NARAYANAN, KORTHIKANTI, TORCHTITAN = "arXiv 2104.04473", "arXiv 2205.05198", "torchtitan 2024-12"


@dataclass(frozen=True)
class Run:
    """One published run.

    Attributes:
        name: model and what was done to it.
        source: who measured it.
        family: ``gpt2`` or ``llama``, of transformers.
        sizes: of its config.
        length: tokens of a sample.
        layout: with dp and microbatches.
        rows: samples of a microbatch.
        recompute: what was computed again.
        cluster: file of the machines.
        changes: what is different about them.
        seconds: of a step, as published.
        batch: samples of a replica in a step, where the source says neither how many a microbatch has nor the stages of a rank.
    """

    name: str
    source: str
    family: str
    sizes: dict[str, Any]
    length: int
    layout: Layout
    rows: int
    recompute: Recompute
    cluster: str
    changes: dict[str, Any]
    seconds: float
    batch: int | None = None


def _gpt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": 51_200, "n_positions": 2048}


_LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192,
}  # fmt: skip
_GRAND_TETON = {"memory_gib": 96, "memory_gb_per_s": 2400}
# hidden, layers, heads; pp, vp, microbatches, samples of each; seconds with full recomputation, and with sp and selective
_GPTS = (
    ("22B", (6144, 48, 64), (1, 1, 1, 4), (1.42, 1.10)),
    ("175B", (12_288, 96, 96), (8, 3, 64, 1), (18.13, 13.75)),
    ("530B", (20_480, 105, 128), (35, 3, 280, 1), (49.05, 37.83)),
    ("1T", (25_600, 128, 160), (64, 1, 512, 1), (94.42, 71.49)),
)


# hidden, layers, heads; tp, pp, devices, samples of a step; operations of a device in a second
_TABLE_1 = (
    ("1.7B", (2304, 24, 24), (1, 1, 32, 512), 137e12),
    ("3.6B", (3072, 30, 32), (2, 1, 64, 512), 138e12),
    ("7.5B", (4096, 36, 32), (4, 1, 128, 512), 142e12),
    ("18.4B", (6144, 40, 48), (8, 1, 256, 1024), 135e12),
    ("39.1B", (8192, 48, 64), (8, 2, 512, 1536), 138e12),
    ("76.1B", (10_240, 60, 80), (8, 4, 1024, 1792), 140e12),
    ("145.6B", (12_288, 80, 96), (8, 8, 1536, 2304), 148e12),
    ("310.1B", (16_384, 96, 128), (8, 16, 1920, 2160), 155e12),
    ("529.6B", (20_480, 105, 128), (8, 35, 2520, 2520), 163e12),
    ("1008B", (25_600, 128, 160), (8, 64, 3072, 3072), 163e12),
)


_WAYS: tuple[tuple[str, bool, Recompute], ...] = (
    ("everything recomputed", False, "full"),
    ("sp, attention recomputed", True, "none"),  # which its kernel does by itself today
)


def published_runs() -> list[Run]:
    """All of them, the smallest of each source first."""
    runs = []
    for name, (hidden, layers, heads), (pp, vp, count, rows), published in _GPTS:
        for (how, sp, recompute), seconds in zip(_WAYS, published, strict=True):
            layout = Layout(tp=8, pp=pp, vp=vp, dp=1, microbatches=count, sp=sp)
            sizes = _gpt(hidden, layers, heads)
            run = Run(f"GPT {name}, {how}", KORTHIKANTI, "gpt2", sizes, 2048, layout, rows, recompute, "a100_8x", {}, seconds)
            runs.append(run)
    for dp, rate in ((8, 5762), (128, 5605)):
        layout, name = Layout(dp=dp, zero=3, microbatches=1), f"Llama 3.1 8B on {dp}"
        seconds = 2 * 8192 / rate
        run = Run(name, TORCHTITAN, "llama", _LLAMA_8B, 8192, layout, 2, "selective", "h100_8x", _GRAND_TETON, seconds)
        runs.append(run)
    return [*runs, *_table_1()]


def _table_1() -> Iterator[Run]:
    for name, (hidden, layers, heads), (tp, pp, devices, batch), rate in _TABLE_1:
        dp = devices // tp // pp
        layout, sizes = Layout(tp=tp, pp=pp, dp=dp), _gpt(hidden, layers, heads)
        seconds = recomputed_flops(hidden, layers, batch) / devices / rate
        yield Run(f"GPT {name}", NARAYANAN, "gpt2", sizes, 2048, layout, 1, "full", "a100_8x", {}, seconds, batch // dp)


def recomputed_flops(hidden: int, layers: int, batch: int) -> float:
    """Of a step with everything recomputed: 96 B s l h^2 (1 + s / 6h + V / 16lh), arXiv 2104.04473, equation 3."""
    length, vocabulary = 2048, 51_200
    share = 1 + length / (6 * hidden) + vocabulary / (16 * layers * hidden)
    return 96 * batch * length * layers * hidden**2 * share
