"""What the numbers of a search say, in words."""

from __future__ import annotations

from lightning_par.plan.render import format_bytes
from lightning_par.planner.search import Outlook


def advise(outlook: Outlook) -> list[str]:
    """Sentences, each with the numbers that it follows from."""
    best, cluster, alone = outlook.best[0], outlook.cluster, dict(outlook.alone)
    layout, usable = best.candidate.layout, cluster.device.usable_bytes
    words = []
    whole = alone.get("data")
    if whole is not None and whole.most_bytes <= usable:
        words.append(
            f"The model fits on one device ({format_bytes(whole.most_bytes)} of {format_bytes(usable)} with its replicas): nothing "
            "has to be split to fit."
        )
        if layout.model_size > 1:
            gain = whole.sample_seconds / best.sample_seconds - 1
            words.append(f"Splitting the computation pays all the same: a step is {gain:.0%} quicker than with replicas.")
    sharded = alone.get("zero3")
    if layout.model_size == 1 and sharded is not None and (whole is None or whole.most_bytes > usable):
        words.append("ZeRO alone is enough: no layer and no chain has to be split over devices.")
    if sharded is not None and layout.zero < 3 and sharded.sample_seconds > best.sample_seconds:
        share = sharded.sample_seconds / best.sample_seconds - 1
        words.append(
            f"More sharding only adds traffic: zero3 alone sends {format_bytes(sharded.sent_bytes['dp'])} from each device in a "
            f"step, and takes {share:.0%} longer."
        )
    if layout.tp > 1:
        size = best.sent_bytes["tp"]
        sentence = (
            f"tp{layout.tp} sends {format_bytes(size)} from each device in a step, inside a node of {cluster.devices_per_node}"
        )
        if cluster.num_nodes > 1:
            sentence += f": over the links between nodes that alone would take {size / cluster.between.bytes_per_second:.2g} s"
        words.append(f"{sentence}.")
    if best.candidate.recompute != "none":
        words.append(f"Blocks are recomputed ({best.candidate.recompute}): without it a step would not fit.")
    return words
