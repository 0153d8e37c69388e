"""A search as its user sees it: what to type, the best layouts, what each technique would cost, and why not the others."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_par.plan.render import format_bytes
from lightning_par.planner.advice import advise
from lightning_par.planner.estimate import Estimate
from lightning_par.planner.search import Miss, Outlook

AXES = ("tp", "pp", "dp")
_NUM_MISSES = 12
_BEST = (
    "rate: {unit} of a device in a second; MFU: with causal attention counted half (and whole); memory: of the fullest rank; "
    "waits: for what travels over an axis"
)


def print_outlook(outlook: Outlook, console: Console, tokens: int | None) -> None:
    """Print a search. Its first line is what to type.

    Args:
        outlook: what was found.
        console: where to.
        tokens: of a sample; None where samples have none.
    """
    cluster = outlook.cluster
    console.print(outlook.best[0].candidate.words, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{outlook.batch} samples a step on {cluster.num_nodes} x {cluster.devices_per_node} devices of {cluster.name}; of "
        f"{outlook.num_considered} ways that fit, the quickest of each mesh and ZeRO stage "
        f"(the first one with batches of {outlook.batch // (outlook.best[0].candidate.layout.dp or 1)}):",
        highlight=False,
    )
    if outlook.asked is not None:
        console.print(f"asked for: {outlook.asked.words}: {outlook.asked.reason}", markup=False, highlight=False, soft_wrap=True)
    console.print(_best(outlook, tokens))
    console.print(_techniques(outlook))
    for words in advise(outlook):
        console.print(f"- {words}", markup=False, highlight=False)
    for miss in nearest(outlook.misses):
        console.print(f"not {miss.words}: {miss.reason}", markup=False, highlight=False)
    told = "; ".join(f"{what}: {words}" for what, words in where_from(outlook).items())
    console.print(told, markup=False, highlight=False, soft_wrap=True)
    console.print(f"rates: {cluster.source}", markup=False, highlight=False, style="dim")


def outlook_json(outlook: Outlook, tokens: int | None) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "cluster": outlook.cluster.name,
        "num_devices": outlook.cluster.num_devices,
        "batch": outlook.batch,
        "source": outlook.cluster.source,
        "where_from": where_from(outlook),
        "best": [_json(estimate, outlook, tokens) for estimate in outlook.best],
        "alone": {name: _json(estimate, outlook, tokens) for name, estimate in outlook.alone},
        "misses": [{"words": miss.words, "reason": miss.reason} for miss in outlook.misses],
        "advice": advise(outlook),
        "asked": None if outlook.asked is None else {"words": outlook.asked.words, "reason": outlook.asked.reason},
    }


def _json(estimate: Estimate, outlook: Outlook, tokens: int | None) -> dict[str, Any]:
    causal, whole = model_flops_utilization(estimate, outlook)
    return {
        "words": estimate.candidate.words,
        "step_seconds": estimate.step_seconds,
        "parts": dict(estimate.parts),
        "bubble": estimate.bubble,
        "per_device_per_second": rate(estimate, outlook, tokens),
        "unit": "samples" if tokens is None else "tokens",
        "mfu_causal": causal,
        "mfu": whole,
        "memory_bytes": [memory.total for memory in estimate.memory],
        "sent_bytes": dict(estimate.sent_bytes),
        "inside_a_node": dict(estimate.links),
    }


def where_from(outlook: Outlook) -> dict[str, str]:
    """Which numbers were measured, and which are the datasheet's."""
    calibration, (measured, count) = outlook.cluster.calibration, outlook.measured
    words = {"compute": "datasheet"}
    if calibration is not None and measured:
        words["compute"] = f"measured on {calibration.device} on {calibration.date} for {measured} of {count} actions of blocks"
        words["compute"] += ", the rest by the datasheet, scaled as those are to theirs" if measured < count else ""
    elif calibration is not None and calibration.series:
        words["compute"] = f"datasheet (of this model nothing is measured on {calibration.device})"
    links = {} if calibration is None else calibration.links
    for name, title in (("inside", "inside a node"), ("between", "between nodes")):
        words[title] = "measured" if name in links else "datasheet"
    return words


def rate(estimate: Estimate, outlook: Outlook, tokens: int | None) -> float:
    """Tokens, or samples where there are none, of a device in a second."""
    return (tokens or 1) / estimate.sample_seconds / outlook.cluster.num_devices


def model_flops_utilization(estimate: Estimate, outlook: Outlook) -> tuple[float, float]:
    """Operations of the model as a fraction of the device's peak (PaLM, arXiv 2204.02311): attention counted half, and whole.

    Nothing that is computed again counts. The peak is that of the fastest dtype in the step, by the datasheet.
    """
    peak = max(outlook.cluster.device.peak_flops.values()) * outlook.cluster.num_devices
    causal, whole = (flops / estimate.step_seconds / peak for flops in estimate.flops)
    return causal, whole


def _best(outlook: Outlook, tokens: int | None) -> Table:
    table = Table("what to type", caption=_BEST.format(unit="samples" if tokens is None else "tokens"), caption_justify="left")
    for heading in ("step", "rate", "MFU", "memory", "bubble", *(f"{axis} waits" for axis in AXES)):
        table.add_column(heading, justify="right", no_wrap=True)
    for estimate in outlook.best:
        causal, whole = model_flops_utilization(estimate, outlook)
        table.add_row(
            estimate.candidate.words,
            seconds(estimate.step_seconds),
            f"{rate(estimate, outlook, tokens):,.4g}",
            f"{causal:.1%} ({whole:.1%})",
            format_bytes(estimate.most_bytes),
            f"{estimate.bubble:.1%}",
            *(f"{estimate.parts[axis] / estimate.step_seconds:.1%}" for axis in AXES),
        )
    return table


def _techniques(outlook: Outlook) -> Table:
    """What one rank stores, computes and sends under each technique alone, and under the best layout."""
    table = Table("one rank", "as", title="Each technique alone, and the best layout", title_justify="left")
    for heading in ("weights", "and states", "activations", "computes", "sends", "step"):
        table.add_column(heading, justify="right", no_wrap=heading != "sends")
    for name, estimate in (*outlook.alone, ("best", outlook.best[0])):
        fullest = max(estimate.memory, key=lambda memory: memory.total)
        table.add_row(
            name,
            estimate.candidate.words.removeprefix("parallel="),
            format_bytes(fullest.parameters + fullest.gathered),
            format_bytes(fullest.gradients + fullest.states),
            format_bytes(fullest.activations + fullest.working),
            seconds(estimate.parts["compute"]),
            ", ".join(_sends(estimate)) or "nothing",
            seconds(estimate.step_seconds),
        )
    return table


def _sends(estimate: Estimate) -> list[str]:
    """``1.5 GiB tp in a node``."""
    return [f"{format_bytes(size)} {axis} {where(estimate, axis)}" for axis, size in estimate.sent_bytes.items() if size]


def where(estimate: Estimate, axis: str) -> str:
    """Over which links an axis sends."""
    return "in a node" if estimate.links[axis] else "between nodes"


def nearest(misses: tuple[Miss, ...]) -> list[Miss]:
    """A few of each reason."""
    kinds: dict[str, list[Miss]] = {}
    for miss in misses:
        kinds.setdefault(miss.reason.split(":")[0].split(" by ")[0], []).append(miss)
    share = max(1, _NUM_MISSES // max(1, len(kinds)))
    return [miss for each in kinds.values() for miss in each[:share]]


def seconds(value: float) -> str:
    """Three digits and a unit."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
