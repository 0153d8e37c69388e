"""A simulation as text for a terminal."""

from __future__ import annotations

from itertools import chain

from rich.console import Console
from rich.table import Table

from lightning_par.picture.simulation import Simulation
from lightning_par.pipeline.draw import draw_timeline
from lightning_par.pipeline.simulate import Span


def print_simulation(simulation: Simulation, console: Console) -> None:
    """The schedule drawn in characters where it fits the terminal, then its numbers."""
    timeline = simulation.timeline
    drawing = draw_timeline(timeline, min(filter(None, map(_seconds, chain(*timeline.rows)))))
    width = max(map(len, drawing.splitlines()))
    if width <= console.width:
        console.print(drawing, markup=False, highlight=False)
    else:
        console.print(f"(the drawing is {width} characters wide and this terminal {console.width}: see the page)", style="dim")
    console.print(_table(simulation))
    makespan, ideal = timeline.makespan_seconds, simulation.ideal
    console.print(
        f"makespan {makespan:.4g}, ideal {ideal:.4g} (the same work, divided evenly over the ranks, with no idle time), overhead "
        f"{makespan / ideal - 1:.1%}",
        highlight=False,
    )


def _table(simulation: Simulation) -> Table:
    timeline, panel = simulation.timeline, simulation.picture.panels[0]
    transfers = any(timeline.exposed_transfer_seconds)
    headings = ["works", "bubble", "bubble, equal costs", *["waits for transfers"] * transfers, "peak activations"]
    table = Table("rank", "stages", title=f"{simulation.schedule} on {simulation.layout}", title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right")
    for rank, lane in enumerate(panel.lanes):
        works = sum(map(_seconds, lane.spans))
        shares = [f"{values[rank]:.1%}" for values in panel.bubbles.values()]
        waits = [f"{timeline.exposed_transfer_seconds[rank]:.4g}"] * transfers
        peak = f"{timeline.peak_in_flight[rank]:.4g}"
        table.add_row(str(rank), " ".join(map(str, lane.stages)), f"{works:.4g}", *shares, *waits, peak)
    means = [f"{sum(values) / len(values):.1%}" for values in panel.bubbles.values()]
    table.add_section()
    table.add_row("all", "", "", *means, *[""] * transfers, f"{max(timeline.peak_in_flight):.4g}")
    return table


def _seconds(span: Span) -> float:
    return span.end_seconds - span.start_seconds
