"""How the times of tensor parallelism are shown."""

from __future__ import annotations

from benchmarks.contest_table import ContestTable
from benchmarks.shards import DEPTH, INNER, LENGTH, NUM_RANKS, ROWS, VOCABULARY, WIDTH, make_model

_SECTION = f"""\
## Tensor parallelism

A Llama of transformers split over {NUM_RANKS} ranks with AdamW, fp32, no clipping. All systems train it in the same processes in
turns, there and back (ABBA), after their losses in three steps of SGD were those of one process.

- step: forward, backward, reductions and the optimizer's step, of the slowest rank; the quickest and the median
- to DTensor: as a multiple of DTensor's with one style for each linear layer (under tp2_sp: the sequence-parallel plan of torch's
  tutorial); shared inputs: with a PrepareModuleInput for each input that several layers read
- with DTensor the embedding, the head and the loss are split over the vocabulary, as by lightning_par; AutoTP leaves them whole
- CPU: what the busiest rank's process computes in a step; what it waits for the other one or for a core is no part of it

Made by `python -m benchmarks.tensor --markdown`.
"""


def _facts() -> dict[str, str]:
    millions = sum(p.numel() for p in make_model().parameters()) / 1e6
    shape = f"width {WIDTH}, inner {INNER}, depth {DEPTH}, vocabulary {VOCABULARY}"
    return {
        "model": f"LlamaForCausalLM of {millions:.1f} million parameters: {shape}",
        "batch": f"{ROWS} rows of {LENGTH} tokens",
    }


TABLE = ContestTable(
    title=f"Steps of {NUM_RANKS} tensor-parallel ranks",
    section=_SECTION,
    against=("DTensor",),
    facts=_facts,
    packages=("torch", "transformers", "deepspeed"),
)
