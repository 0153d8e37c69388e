"""The plan of a run as its user sees it: printed at the start, saved with the logs."""

from __future__ import annotations

from pathlib import Path

import yaml

from lightning_par.engine import traced_costs
from lightning_par.pipeline.simulate import simulate
from lightning_par.pipeline.tables import Tables
from lightning_par.plan import Plan, render_plan


def report_plan(plan: Plan, schedule: str, folder: str | None, prints: bool) -> None:
    """Print the plan, and save it as ``plan.yaml``. One rank calls it.

    Args:
        plan: all decisions of the run.
        schedule: of its pipeline.
        folder: where the run's logs go, made if need be; None to save nothing.
        prints: whether to print.
    """
    if prints:
        print(describe_plan(plan, schedule), flush=True)
    if folder is not None:
        path = Path(folder, "plan.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(plan.to_dict(), sort_keys=False))


def describe_plan(plan: Plan, schedule: str, color: bool = False) -> str:
    """The plan as tables, and what its schedule costs.

    Args:
        plan: all decisions of the run.
        schedule: of its pipeline.
        color: whether with colours, for a terminal.
    """
    rendered = render_plan(plan, color=color)
    if plan.layout.pp == 1:
        return rendered
    costs, num_microbatches = traced_costs(plan), plan.layout.microbatches or 1
    timeline = simulate(Tables(schedule, plan.layout, costs).training(num_microbatches), costs)
    words = (
        f"Schedule {schedule}: by the FLOPs of the stages, ranks wait {timeline.bubble_fraction:.1%} of a step (the bubble), and "
        f"hold the activations of up to {max(timeline.peak_in_flight):g} microbatches"
    )
    return f"{rendered.rstrip()}\n{words}\n"
