"""How the times of replicas are shown."""

from __future__ import annotations

from benchmarks.contest_table import ContestTable
from benchmarks.replicas import DEPTH, LENGTH, NUM_RANKS, ROWS, VOCABULARY, WIDTH, Trainee

_SECTION = f"""\
## ZeRO

A GPT on {NUM_RANKS} replicas with AdamW, fp32, no clipping. All systems train it in the same processes in turns, there and back
(ABBA), after their losses in three steps of SGD were those of one process.

- step: forward, backward, reductions and the optimizer's step, of the slowest rank; the quickest and the median
- to DeepSpeed: as a multiple of DeepSpeed's own loop (`engine(...)`, `engine.backward`, `engine.step`) at the same stage
- freed memory stays with the process, for all systems: what the C library gives back, and when, is luck
- CPU: what the busiest rank's process computes in a step; what it waits for the other one or for a core is no part of it

Made by `python -m benchmarks.zero --markdown`.
"""


def model_facts() -> dict[str, str]:
    """The model and what it is given."""
    millions = sum(p.numel() for p in Trainee().parameters()) / 1e6
    return {
        "model": f"GPT of {millions:.1f} million parameters: width {WIDTH}, depth {DEPTH}, vocabulary {VOCABULARY}",
        "batch": f"{ROWS} rows of {LENGTH} tokens for each replica",
    }


TABLE = ContestTable(
    title=f"Steps of {NUM_RANKS} replicas",
    section=_SECTION,
    against=("DeepSpeed",),
    facts=model_facts,
    packages=("torch", "deepspeed"),
)
