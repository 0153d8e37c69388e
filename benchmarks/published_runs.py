"""Runs that others have published, with everything that a forecast of them needs.

- Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), tables 3 and 5: GPTs on
  A100 of 80 GB, tp8, sequences of 2,048, a vocabulary of 51,200, in half precision; seconds of an iteration.
- torchtitan, "Llama 3.1 on H100", December 2024: FSDP2 without torch.compile, sequences of 8,192, selective activation
  checkpointing; tokens of a device in a second. Its H100 have 96 GB HBM2e of 2.4 TB/s and 500 W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_par.layout import Layout
from lightning_par.plan.plan import Recompute

KORTHIKANTI, TORCHTITAN = "arXiv 2205.05198", "torchtitan 2024-12"


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
    return runs
