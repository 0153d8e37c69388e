"""A search as one page that needs nothing else, made as that of `lightning_par.picture.html`: the best layouts, what the best one
stores, sends and does when, and why not the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_par.picture import Lane, Panel, Picture
from lightning_par.picture.html import SCRIPTS, fill_page, picture_data
from lightning_par.plan.render import format_bytes
from lightning_par.planner.advice import advise
from lightning_par.planner.estimate import Estimate
from lightning_par.planner.report import AXES, model_flops_utilization, nearest, rate, seconds, where
from lightning_par.planner.search import Outlook

# Okabe and Ito, as in `lightning_par.picture.colour`
STORED = {
    "parameters": "#0072B2", "gradients": "#56B4E9", "states": "#009E73", "activations": "#E69F00", "working": "#F0E442",
    "gathered": "#CC79A7",
}  # fmt: skip
PARTS = {
    "compute": "#0072B2", "tp": "#E69F00", "pp": "#F0E442", "bubble": "#bbbbbb", "dp": "#D55E00", "optimizer": "#009E73",
}  # fmt: skip


def plan_page(outlook: Outlook, tokens: int | None) -> str:
    """The page's text.

    Args:
        outlook: what was found.
        tokens: of a sample; None where samples have none.
    """
    best, cluster = outlook.best[0], outlook.cluster
    title = f"{best.candidate.words} on {cluster.num_nodes} x {cluster.devices_per_node} devices of {cluster.name}"
    plan = {
        "lead": f"{outlook.batch:,} samples a step in {seconds(best.step_seconds)}; of {outlook.num_considered:,} ways that fit. "
        f"Rates: {cluster.source}",
        "colours": {**STORED, **PARTS},
        "best": _best(outlook, tokens),
        "memory": _memory(best, cluster.device.usable_bytes),
        "traffic": _traffic(best),
        "advice": advise(outlook),
        "misses": [[miss.words, miss.reason] for miss in nearest(outlook.misses)],
    }
    if best.timeline is None:
        return fill_page("plan.html", title, {"title": title, "plan": plan}, ["plan.js"])
    data = {**picture_data(timeline_picture(best)), "title": title, "plan": plan}
    return fill_page("plan.html", title, data, [*SCRIPTS, "plan.js"])


def timeline_picture(best: Estimate) -> Picture:
    """The replayed microbatches of a pipeline."""
    assert best.timeline is not None
    lanes = tuple(Lane(f"pp {pp}", pp, spans) for pp, spans in enumerate(best.timeline.rows))
    few, count = 1 + max(span.action.microbatch for lane in lanes for span in lane.spans), best.candidate.layout.microbatches or 1
    step = "forecast" if few == count else f"forecast, {few} of {count} microbatches"
    panel = Panel(step, "dp 0, tp 0", lanes, {"simulated": best.timeline.idle_fraction})
    return Picture(best.candidate.words, (panel,))


def _best(outlook: Outlook, tokens: int | None) -> dict[str, Any]:
    """Each of the best with where the time of its step goes."""
    longest = max(estimate.step_seconds for estimate in outlook.best)
    unit = "samples" if tokens is None else "tokens"
    lines = []
    for estimate in outlook.best:
        causal, whole = model_flops_utilization(estimate, outlook)
        cells = [
            estimate.candidate.words,
            seconds(estimate.step_seconds),
            f"{rate(estimate, outlook, tokens):,.4g}",
            f"{causal:.1%} ({whole:.1%})",
            format_bytes(estimate.most_bytes),
            f"{estimate.bubble:.1%}",
            *(f"{estimate.parts[axis] / estimate.step_seconds:.1%}" for axis in AXES),
        ]
        lines.append(_line(cells, estimate.parts, PARTS, longest, seconds))
    headings = ["what to type", "step", f"{unit}/s/device", "MFU (attention whole)", "memory", "bubble"]
    return {"headings": [*headings, *(f"{axis} waits" for axis in AXES)], "lines": lines}


def _memory(best: Estimate, usable: int) -> dict[str, Any]:
    """Each pp coordinate with what its ranks store, beside what tensors get."""
    most = max(usable, best.most_bytes)
    lines = []
    for pp, memory in enumerate(best.memory):
        sizes = {kind: getattr(memory, kind) for kind in STORED}
        cells = [f"pp {pp}", *(format_bytes(size) for size in sizes.values()), format_bytes(memory.total)]
        lines.append(_line(cells, sizes, STORED, most, format_bytes, mark=usable / most))
    return {"headings": ["rank", *STORED, f"of {format_bytes(usable)}"], "lines": lines}


def _traffic(best: Estimate) -> dict[str, Any]:
    """Each axis with what a rank sends over it."""
    most = max([*best.sent_bytes.values(), 1.0])
    lines = []
    for axis, size in best.sent_bytes.items():
        waits = seconds(best.parts[axis]) if size else ""
        cells = [axis, format_bytes(size) if size else "nothing", where(best, axis) if size else "", waits]
        lines.append(_line(cells, {axis: size}, PARTS, most, format_bytes))
    return {"headings": ["axis", "in a step", "link", "waits for it"], "lines": lines}


def _line(
    cells: list[str], parts: Mapping[str, float], names: Iterable[str], longest: float, written: Any, mark: float | None = None
) -> dict[str, Any]:
    """Words and a bar: its parts as shares of the longest one."""
    shown = [{"name": name, "share": parts[name] / longest, "words": written(parts[name])} for name in names if parts.get(name)]
    return {"cells": cells, "parts": shown, "mark": mark}
