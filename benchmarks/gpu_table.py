"""The times and memory of one GPU for a terminal, for a page, and for programs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import median

from benchmarks.facts import versions
from benchmarks.gpu_pace import DEPTH, LENGTH, ROWS, TORCH, VOCABULARY, WIDTH, Row, flops_of_step
from benchmarks.rendering import markdown_table, terminal_table
from lightning_par.host.here import file_of
from lightning_par.planner.cluster import shipped_cluster

HEADINGS = (
    "training", "system", "step ms", "quickest", "to PyTorch", "tokens/s", "TFLOP/s", "MFU %", "causal %", "kernels", "idle %",
    "peak GiB", "to PyTorch", "forecast GiB", "off by",
)  # fmt: skip
_NUM_WORDS = 2  # of the headings: columns that are no numbers
_SECTION = """\
## One GPU

A Llama of transformers, 1.2 billion parameters, with AdamW (fused), in bfloat16 under autocast with float32 weights: a plain
PyTorch loop, Lightning's own Trainer, and ours, which is what our strategy costs where there is nothing to split, and what its
options save. Each row is a process of its own, or two, there and back, where it is about speed.

- step: the median of means of several steps, which the host does not wait for in between; and the quickest mean
- to PyTorch: as a multiple of the plain loop, with the same done to the model by hand (`layer.compile()`,
  `gradient_checkpointing_enable()`, torchao's `convert_to_float8_training`)
- TFLOP/s: of the model, by PaLM's count: 6 for each weight that multiplies and token, and attention; nothing for recomputation
- MFU: these as a fraction of the datasheet's bfloat16 rate, float8 too; causal: with half the operations of attention
- kernels: that a step launches; idle: of a step's time, without a kernel or a copy, both as torch's profiler sees them
- peak: of tensors, as torch's allocator counts; forecast: what the plan says before anything is on the GPU

Made by `python -m benchmarks.gpu --markdown`.
"""


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What stands under `HEADINGS`: each way to train once, in the order in which they were measured first."""
    together: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row.what, row.system
        before = together.get(key)
        together[key] = row if before is None or before.error else replace(before, seconds=before.seconds + row.seconds)
    whats = list(dict.fromkeys(what for what, _ in together))
    merged = sorted(together.values(), key=lambda row: whats.index(row.what))
    peak_flops = _peak_flops()
    return [_line(row, merged, peak_flops) for row in merged]


def _line(row: Row, rows: Sequence[Row], peak_flops: float | None) -> tuple[str, ...]:
    if row.error:
        return (row.what, row.system, "failed", *[""] * (len(HEADINGS) - 3))
    peers = [each for each in rows if each.system == TORCH and each.what == row.what and not each.error]
    peer = peers[0] if peers and peers[0] is not row else None
    seconds = median(row.seconds)
    return (
        row.what,
        row.system,
        f"{1000 * seconds:.1f}",
        f"{1000 * min(row.seconds):.1f}",
        "" if peer is None else f"{seconds / median(peer.seconds):.3f}",
        f"{ROWS * LENGTH / seconds:,.0f}",
        f"{flops_of_step() / seconds / 1e12:.0f}",
        *("" if peak_flops is None else f"{100 * flops_of_step(causal) / seconds / peak_flops:.1f}" for causal in (False, True)),
        f"{row.kernels:,}",
        f"{100 * row.idle:.1f}",
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


def _peak_flops() -> float | None:
    """By the datasheet, in bfloat16."""
    file = file_of(_gpu_name())
    return None if file is None else shipped_cluster(file, 1).device.peak_flops["bfloat16"]


def _gpu_name() -> str:
    """Asked of the driver: this process has never seen the GPU."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
