"""Pictures of a pipeline in time: a page, a PNG and a Chrome trace, as pure functions of the same data."""

from __future__ import annotations

from pathlib import Path

from lightning_par.picture.bubble import bubbles_of, mean_costs, schedule_bubbles
from lightning_par.picture.chrome import chrome_trace
from lightning_par.picture.html import html_page
from lightning_par.picture.picture import Lane, Panel, Picture, format_time
from lightning_par.picture.png import write_png

__all__ = [
    "Lane",
    "Panel",
    "Picture",
    "bubbles_of",
    "chrome_trace",
    "format_time",
    "html_page",
    "mean_costs",
    "schedule_bubbles",
    "write_picture",
    "write_png",
]


def write_picture(picture: Picture, folder: Path) -> tuple[Path, Path, Path]:
    """Write ``timeline.html``, ``timeline.png`` and ``trace.json`` into ``folder``, which is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    page, image, trace = folder / "timeline.html", folder / "timeline.png", folder / "trace.json"
    page.write_text(html_page(picture), encoding="utf-8")
    write_png(picture, image)
    trace.write_text(chrome_trace(picture), encoding="utf-8")
    return page, image, trace
