"""From what every rank saw in an interval of a training to what is said of it: arithmetic, the same on every rank.

What the words mean::

    bubble             1 - work / makespan of one batch: the mean work of a pipeline's ranks, the longest time from the begin of a
                       rank's first action to the end of its last; mean over pipelines
    stage imbalance    the most work of a pp coordinate over the mean of them, less 1: 0 where all stages are equally long
    MFU                operations of the model over what the devices could do at their peak (PaLM, arXiv 2204.02311, appendix B):
                       three times the forward, nothing that is computed again, with causal attention counted half, and whole
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

from lightning_par.layout import Layout
from lightning_par.plan.plan import ForwardWork

_PASSES = 3  # a backward has two products for each of a forward


@dataclass(frozen=True)
class Seen:
    """What one rank saw. All are numbers, for a message.

    Attributes:
        tokens, samples: that its replica was trained on; no tokens where its batches have none.
        seconds: of training.
        peak_bytes: the most that it has stored since its process began.
        busy_seconds: of work in the recorded batch; 0 where none was recorded.
        pipeline_seconds: from the begin of its first action to the end of its last.
        tp_bytes, pp_bytes, dp_bytes: that it sent over each axis.
    """

    tokens: float
    samples: float
    seconds: float
    peak_bytes: float
    busy_seconds: float
    pipeline_seconds: float
    tp_bytes: float
    pp_bytes: float
    dp_bytes: float


def measure(
    ranks: Sequence[Seen], layout: Layout, num_steps: int, work: ForwardWork | None = None, peak_flops: float | None = None
) -> dict[str, float]:
    """What is logged of an interval, by name.

    Args:
        ranks: what each saw, by global rank.
        layout: of the run, dp resolved.
        num_steps: of the optimizer.
        work: of the forward; None where it is not known.
        peak_flops: products per second of each device; None where it is not known.
    """
    seconds = max(rank.seconds for rank in ranks)
    samples, tokens = (sum(getattr(rank, name) for rank in ranks) / layout.model_size for name in ("samples", "tokens"))
    found = {"tokens_per_second": tokens / seconds} if tokens else {}
    found |= {"samples_per_second": samples / seconds, "step_seconds": seconds / num_steps}
    if work is not None:
        share = tokens / (work.samples * work.tokens) if work.tokens else samples / work.samples
        rates = {name: _PASSES * share * flops / seconds / len(ranks) for name, flops in _conventions(work).items()}
        found |= {f"device_flops_per_second{name}": rate for name, rate in rates.items()}
        found |= {f"mfu{name}_fraction": rate / peak_flops for name, rate in rates.items()} if peak_flops else {}
    if all(rank.pipeline_seconds for rank in ranks):
        found |= {"bubble_fraction": _bubble(ranks, layout), "stage_imbalance_fraction": _imbalance(ranks, layout)}
    for axis, size in (("tp", layout.tp), ("pp", layout.pp), ("dp", layout.dp or 1)):
        if size > 1:
            found[f"sent_{axis}_bytes_per_step"] = fmean(getattr(rank, f"{axis}_bytes") for rank in ranks) / num_steps
    return found | {"peak_memory_bytes": max(rank.peak_bytes for rank in ranks)}


def _conventions(work: ForwardWork) -> Mapping[str, float]:
    return {"": work.whole_flops, "_causal": work.causal_flops}


def _bubble(ranks: Sequence[Seen], layout: Layout) -> float:
    bubbles = []
    for dp, tp in product(range(layout.dp or 1), range(layout.tp)):
        pipeline = [ranks[layout.rank_of(pp, dp, tp)] for pp in range(layout.pp)]
        makespan = max(rank.pipeline_seconds for rank in pipeline)
        bubbles.append(1 - fmean(rank.busy_seconds for rank in pipeline) / makespan)
    return fmean(bubbles)


def _imbalance(ranks: Sequence[Seen], layout: Layout) -> float:
    work = [0.0] * layout.pp
    for rank, seen in enumerate(ranks):
        work[layout.coordinate_of(rank).pp] += seen.busy_seconds
    return max(work) / fmean(work) - 1
