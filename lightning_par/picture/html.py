"""A picture as one page that needs nothing else: no network, no library."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from lightning_par.picture.bubble import MEANINGS
from lightning_par.picture.colour import COLOURS, LIGHTEST, NAMES
from lightning_par.picture.picture import Lane, Panel, Picture

SCRIPTS = ("data.js", "scale.js", "draw.js", "control.js")  # of a timeline
_KINDS = tuple(COLOURS)


def html_page(picture: Picture) -> str:
    """The page's text. It shows every panel, one at a time."""
    return fill_page("page.html", picture.title, picture_data(picture), SCRIPTS)


def fill_page(template: str, title: str, data: Any, scripts: Sequence[str]) -> str:
    """A page of the folder ``page`` with its data, the style and its scripts inside.

    Args:
        template: name of the file of its body; ``@TIMELINE@`` in it is where the scripts of a timeline draw.
        title: of the page.
        data: for JSON; the scripts read it from the element ``data``.
        scripts: names of files, in order.
    """
    folder = files("lightning_par.picture") / "page"
    parts = {
        "@BODY@": (folder / template).read_text(encoding="utf-8"),
        "@TIMELINE@": (folder / "timeline.html").read_text(encoding="utf-8"),
        "@TITLE@": html.escape(title),
        "@STYLE@": (folder / "page.css").read_text(encoding="utf-8"),
        "@DATA@": _embedded(data),
        "@SCRIPT@": "\n".join((folder / name).read_text(encoding="utf-8") for name in scripts),
    }
    page = (folder / "frame.html").read_text(encoding="utf-8")
    for mark, text in parts.items():
        before, found, after = page.partition(mark)
        page = before + text + after if found else page
    return page


def _embedded(data: Any) -> str:
    """JSON inside a script element, which the first ``</`` would end."""
    return json.dumps(data, separators=(",", ":")).replace("</", "<\\/")


def picture_data(picture: Picture) -> dict[str, Any]:
    """What the scripts of a timeline read."""
    return {
        "title": picture.title,
        "hasSeconds": picture.has_seconds,
        "kinds": [{"kind": kind, "name": NAMES[kind], "colour": COLOURS[kind]} for kind in _KINDS],
        "lightest": LIGHTEST,
        "panels": [_panel(panel) for panel in picture.panels],
    }


def _panel(panel: Panel) -> dict[str, Any]:
    first = panel.limits[0]
    return {
        "step": panel.step,
        "replica": panel.replica,
        "length": round(panel.limits[1] - first, 9),
        "lanes": [{"label": lane.label, "stages": lane.stages, "spans": _spans(lane, first)} for lane in panel.lanes],
        "bubbles": [
            {"name": name, "meaning": MEANINGS[name], "values": [round(value, 6) for value in values]}
            for name, values in panel.bubbles.items()
        ],
    }


def _spans(lane: Lane, first: float) -> list[list[float]]:
    """Of each action its kind, stage, microbatch, start, end and wait; times to the nanosecond from the panel's first start."""
    return [
        [
            _KINDS.index(span.action.kind),
            span.action.stage,
            span.action.microbatch,
            round(span.start_seconds - first, 9),
            round(span.end_seconds - first, 9),
            round(span.wait_seconds, 9),
        ]
        for span in lane.spans
    ]
