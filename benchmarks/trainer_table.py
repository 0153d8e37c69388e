"""How the times of whole trainings are shown."""

from __future__ import annotations

from benchmarks.contest_table import ContestTable
from benchmarks.replica_table import model_facts
from benchmarks.replicas import LENGTH
from benchmarks.trainers import LIGHTNING, NUM_RANKS, ROWS

_SECTION = f"""\
## Under a Trainer

Whole trainings of a GPT with AdamW, fp32, no clipping, on 1 and {NUM_RANKS} processes, the same rows in every step whoever has
which of them. All systems train in the same processes in turns, there and back (ABBA), each time from the start, after their losses
in three steps of SGD were those of one process.

- step: from the end of one to the end of the next, with loader, hooks and optimizer, of the slowest rank; quickest and median
- lightning_par and Lightning: a Trainer without logger, checkpoints and progress bar; Lightning's strategies are its single device,
  DDPStrategy and ModelParallelStrategy, which leaves it to the module to call fully_shard or parallelize_module
- torch, own loop: no Trainer; DistributedDataParallel, fully_shard or parallelize_module over the same loader
- to Lightning: as a multiple of Lightning's; its strategies for DeepSpeed do not run on a CPU, and it has none for pipelines
- CPU: what the busiest rank's process computes in a step; what it waits for the other one or for a core is no part of it

Made by `python -m benchmarks.trainer --markdown`.
"""


def _facts() -> dict[str, str]:
    return {**model_facts(), "batch": f"{ROWS} rows of {LENGTH} tokens in all"}


TABLE = ContestTable(
    title=f"Steps of trainings on 1 and {NUM_RANKS} processes",
    section=_SECTION,
    against=(LIGHTNING,),
    facts=_facts,
    packages=("torch", "pytorch-lightning", "deepspeed"),
)
