"""What a monitor keeps of a training, and says of it at the end: a table and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_par.picture.training import TrainingPicture, write_training_png
from lightning_par.plan import Plan
from lightning_par.plan.render import format_bytes
from lightning_par.planner.report import seconds


@dataclass(frozen=True)
class Interval:
    """What was logged once.

    Attributes:
        step: steps that had been taken.
        loss: of the last batch; None where a step returned none.
        found: by name.
    """

    step: int
    loss: float | None
    found: dict[str, float]


@dataclass
class Record:
    """Everything that was logged of a training.

    Attributes:
        plan: of the run.
        every: steps between two logs.
        intervals: in order.
        memory: the most bytes that each rank has stored.
    """

    plan: Plan
    every: int
    intervals: list[Interval] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def render(self) -> str:
        """A table: the median of all intervals, and the last one; then the memory of ranks."""
        count = len(self.intervals)
        title = f"{self.plan.module}, {self.plan.layout}: {count} interval{'s' if count > 1 else ''} of {self.every} steps"
        table = Table(title=title, title_justify="left")
        table.add_column("monitor/")
        for heading in ("median", "last"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name in dict.fromkeys(name for interval in self.intervals for name in interval.found):
            values, put = [each.found[name] for each in self.intervals if name in each.found], _format_of(name)
            table.add_row(name, put(statistics.median(values)), put(values[-1]))
        console = Console(width=100)
        with console.capture() as captured:
            console.print(table)
            console.print(f"Peak memory by rank: {self._memory()}", highlight=False)
        return captured.get().rstrip()

    def draw(self, path: Path) -> None:
        """Write the picture.

        Raises:
            OSError: there is no such place.
        """
        name = "tokens_per_second" if "tokens_per_second" in self.intervals[0].found else "samples_per_second"
        losses = [(each.step, each.loss) for each in self.intervals if each.loss is not None]
        rates = [(each.step, each.found[name]) for each in self.intervals if name in each.found]
        layout = self.plan.layout
        stages = [layout.coordinate_of(rank).pp for rank in range(len(self.memory))]
        title = f"{self.plan.module}, {layout}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_training_png(TrainingPicture(title, losses, name.replace("_per_", "/"), rates, self.memory, stages), path)

    def _memory(self) -> str:
        """Of each rank; of many the least and the most for each pp coordinate."""
        if len(self.memory) <= 16:
            return ", ".join(f"{rank}: {format_bytes(int(most))}" for rank, most in enumerate(self.memory))
        by_pp: dict[int, list[int]] = {}
        for rank, most in enumerate(self.memory):
            by_pp.setdefault(self.plan.layout.coordinate_of(rank).pp, []).append(int(most))
        return ", ".join(f"pp {pp}: {format_bytes(min(own))} to {format_bytes(max(own))}" for pp, own in by_pp.items())


def _format_of(name: str) -> Callable[[float], str]:
    """How the values of a name are written, by its unit."""
    if name.endswith("_fraction"):
        return "{:.1%}".format
    if name.endswith("_flops_per_second") or "_flops_per_second_" in name:
        return lambda value: f"{value / 1e12:.4g} T"
    if "bytes" in name:
        return lambda value: format_bytes(int(value))
    return seconds if name == "step_seconds" else "{:,.4g}".format
