"""The times and memory of one GPU for a terminal, for a page, and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

from benchmarks.device_pace import DEPTH, LENGTH, LIGHTNING, ROWS, VOCABULARY, WIDTH, Row, flops_of_step
from benchmarks.facts import versions
from benchmarks.rendering import markdown_table, terminal_table

HEADINGS = (
    "training", "system", "step ms", "to Lightning", "tokens/s", "TFLOP/s", "peak GiB", "to Lightning", "forecast GiB", "off by",
)  # fmt: skip
_NUM_WORDS = 2  # of the headings: columns that are no numbers
_SECTION = """\
## One GPU

A decoder of transformers with AdamW (fused) under the Trainer, unchanged: what our strategy costs where there is nothing to
split, and what its options save. Each row is a process of its own.

- step: the median of four means of several steps, which the host does not wait for in between
- to Lightning: as a multiple of Lightning's own Trainer without a strategy, with the same done to the model by hand
  (`layer.compile()`, `gradient_checkpointing_enable()`, torchao's `convert_to_float8_training`)
- TFLOP/s: of the model, by PaLM's count: 6 for each weight that multiplies and token, and attention; nothing for recomputation
- peak: of tensors, as torch's allocator counts; forecast: what the plan says before anything is on the GPU

Made by `python -m benchmarks.device --markdown`.
"""


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What stands under `HEADINGS`, in the order in which it was measured."""
    return [_line(row, rows) for row in rows]


def _line(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    if row.error:
        return (row.what, row.system, "failed", *[""] * (len(HEADINGS) - 3))
    peers = [each for each in rows if each.system == LIGHTNING and each.what == row.what and not each.error]
    peer = peers[0] if peers and peers[0] is not row else None
    seconds = median(row.seconds)
    return (
        row.what,
        row.system,
        f"{1000 * seconds:.1f}",
        "" if peer is None else f"{seconds / median(peer.seconds):.3f}",
        f"{ROWS * LENGTH / seconds:,.0f}",
        f"{flops_of_step() / seconds / 1e12:.0f}",
        f"{row.peak / 2**30:.2f}",
        "" if peer is None else f"{row.peak / peer.peak:.3f}",
        f"{row.foreseen / 2**30:.2f}" if row.foreseen else "",
        f"{row.foreseen / row.peak - 1:+.1%}" if row.foreseen else "",
    )


def render_table(rows: Sequence[Row]) -> str:
    """As a table for a terminal."""
    return terminal_table("Steps on one GPU", HEADINGS, _NUM_WORDS, lines(rows))


def render_markdown(rows: Sequence[Row]) -> str:
    """The section of benchmarks/RESULTS.md."""
    facts = [f"- {name}: {value}" for name, value in _facts().items()]
    return "\n".join([_SECTION, *markdown_table(HEADINGS, _NUM_WORDS, lines(rows)), "", *facts])


def render_json(rows: Sequence[Row]) -> str:
    """Every number, with where it was taken."""
    return json.dumps({**_facts(), "rows": [asdict(row) for row in rows]}, indent=2)


def _facts() -> dict[str, str]:
    return {
        "model": f"transformers' LlamaForCausalLM: width {WIDTH}, {DEPTH} layers, vocabulary {VOCABULARY}",
        "batch": f"{ROWS} rows of {LENGTH} tokens",
        "machine": _gpu_name(),
        "versions": versions("torch", "pytorch-lightning", "transformers", "torchao"),
    }


def _gpu_name() -> str:
    """Asked of the driver: this process has never seen the GPU."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
