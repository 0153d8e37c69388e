"""The plan of a run as its user sees it: printed at the start, saved with the logs."""

from __future__ import annotations

from pathlib import Path

import yaml

from lightning_par.plan import Plan, render_plan


def report_plan(plan: Plan, folder: str | None, prints: bool) -> None:
    """Print the plan, and save it as ``plan.yaml``. One rank calls it.

    Args:
        plan: all decisions of the run.
        folder: where the run's logs go, made if need be; None to save nothing.
        prints: whether to print.
    """
    if prints:
        print(render_plan(plan), flush=True)
    if folder is not None:
        path = Path(folder, "plan.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(plan.to_dict(), sort_keys=False))
