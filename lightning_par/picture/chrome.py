"""A picture in Chrome's trace format, for chrome://tracing and Perfetto.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Trace Event Format), complete
events ("X") and metadata ("M"); times are microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lightning_par.picture.colour import NAMES
from lightning_par.picture.picture import Lane, Panel, Picture


def chrome_trace(picture: Picture) -> str:
    """The JSON text: one process for each rank, in it an event for each action and for each wait before one."""
    ranks: dict[int, dict[str, Any]] = {}
    events: list[dict[str, Any]] = []
    for panel in picture.panels:
        for lane in panel.lanes:
            ranks.setdefault(lane.rank, {"label": f"{lane.label} ({panel.replica})" if panel.replica else lane.label})
            events += _events(panel, lane)
    names = [_metadata("process_name", rank, {"name": about["label"]}) for rank, about in sorted(ranks.items())]
    order = [_metadata("process_sort_index", rank, {"sort_index": rank}) for rank in sorted(ranks)]
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": [*names, *order, *events]}, separators=(",", ":"))


def _metadata(name: str, rank: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": rank, "tid": 0, "args": arguments}


def _events(panel: Panel, lane: Lane) -> Iterator[dict[str, Any]]:
    for span in lane.spans:
        start, action = panel.offset_seconds + span.start_seconds, span.action
        base = {"ph": "X", "pid": lane.rank, "tid": 0}
        if span.wait_seconds > 0:
            waits_for = {"for": str(action)}
            yield {**base, "name": "wait", "cat": "wait", **_when(start - span.wait_seconds, span.wait_seconds), "args": waits_for}
        arguments = {"step": panel.step, "stage": action.stage, "microbatch": action.microbatch}
        seconds = span.end_seconds - span.start_seconds
        yield {**base, "name": str(action), "cat": NAMES[action.kind], **_when(start, seconds), "args": arguments}


def _when(start_seconds: float, seconds: float) -> dict[str, float]:
    return {"ts": round(start_seconds * 1e6, 3), "dur": round(seconds * 1e6, 3)}
