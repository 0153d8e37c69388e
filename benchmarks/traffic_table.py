"""The counts for a terminal, for a page, and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.facts import machine, versions
from benchmarks.llama import BATCH, HEADS, LENGTH, WIDTH
from benchmarks.rendering import markdown_table, terminal_table
from benchmarks.traffic import LayerTraffic, Row, expected_traffic, listed

# The ratio is that of the bytes to those of the formula.
HEADINGS = ("tp", "system", "forward", "backward", "calls", "bytes sent", "ratio")
_NUM_WORDS = 4  # of the headings: columns that are no numbers
_SECTION = """\
## Communication of tensor parallelism

Collectives per decoder layer and microbatch, and the bytes that one rank sends for them on a ring; ratio: to the bytes of the
formula. Counted below all systems, as the difference of two models of which one has a layer more. Losses and gradients of
each system were those of one process. Grouped queries have a line of their own where they make a difference.

- formula: of Megatron-LM (arXiv 1909.08053, 2205.05198), 8 b s h e (t-1)/t bytes
- lightning_par: as its strategy installs it; global shapes: column layers give tensors of global shape (`plan.activation`)
- DTensor, column and row: one ColwiseParallel or RowwiseParallel for each linear layer
- DTensor, shared inputs: the same, with a PrepareModuleInput for each input that several layers read
- DTensor, sequence parallel: the plan of torch's tutorial
- DeepSpeed AutoTP: `autotp_size` in its configuration, nothing else

Sums that a step makes once for all microbatches (gradients of norms under sequence parallelism) are not in it. Made by
`python -m benchmarks.communication --markdown`.
"""


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What stands under `HEADINGS`: for each size the formulas, then the systems."""
    found: dict[tuple[str, ...], None] = {}  # a set in order: equal lines are given once
    for row in rows:
        found[_line(row.tp, "formula, tensor parallel", expected_traffic(row.tp, False))] = None
        found[_line(row.tp, "formula, sequence parallel", expected_traffic(row.tp, True))] = None
        alike = all(other.counted == row.counted for other in rows if (other.system, other.tp) == (row.system, row.tp))
        found[_line(row.tp, row.system if alike else f"{row.system}, {row.kv_heads} key heads", row.counted)] = None
    return list(found)


def _line(tp: int, name: str, traffic: LayerTraffic) -> tuple[str, ...]:
    ratio = traffic.sent_bytes / expected_traffic(tp, False).sent_bytes
    calls = (listed(traffic.forward), listed(traffic.backward), str(traffic.num_calls))
    return (str(tp), name, *calls, f"{traffic.sent_bytes:,}", f"{ratio:.2f}")


def render_table(rows: Sequence[Row]) -> str:
    """The counts as a table for a terminal."""
    return terminal_table("Per decoder layer and microbatch", HEADINGS, _NUM_WORDS, lines(rows))


def render_markdown(rows: Sequence[Row]) -> str:
    """The section of benchmarks/RESULTS.md."""
    facts = [f"- {name}: {value}" for name, value in _facts().items()]
    return "\n".join([_SECTION, *markdown_table(HEADINGS, _NUM_WORDS, lines(rows)), "", *facts])


def render_json(rows: Sequence[Row]) -> str:
    """Every count, with where it was made."""
    return json.dumps({**_facts(), "rows": [asdict(row) for row in rows]}, indent=2)


def _facts() -> dict[str, str]:
    """What was counted and where; counts do not depend on the machine."""
    return {
        "model": f"transformers' LlamaForCausalLM, random weights, fp32, batch {BATCH}, sequence {LENGTH}, width {WIDTH}, "
        f"{HEADS} heads, {HEADS} and {HEADS // 2} key and value heads",
        "machine": machine(),
        "versions": versions("torch", "transformers", "deepspeed", "pytorch-lightning"),
    }
