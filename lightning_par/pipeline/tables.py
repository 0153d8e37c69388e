"""The tables of a run: what every rank does in a step of so many microbatches, by the chosen schedule."""

from __future__ import annotations

from dataclasses import replace

from lightning_par.errors import ConfigurationError
from lightning_par.layout import Layout
from lightning_par.pipeline.action import Row, Table
from lightning_par.pipeline.schedules import (
    AUTO,
    SCHEDULES,
    build_schedule,
    check_schedule,
    default_chunks,
    default_schedule,
    forward_only,
)
from lightning_par.pipeline.schedules.auto import auto_schedule
from lightning_par.pipeline.simulate import Costs


class Tables:
    """Builds each table once. Every rank builds the same ones by itself.

    Args:
        schedule: its name.
        layout: sizes of the axes, with the stages' placement.
        costs: of each stage, for a schedule that is built from them. Set anew, as to measured ones, they count for every step
            that comes after.
        in_order: whether messages between two ranks arrive in the order in which they were sent, as over NCCL.
    """

    def __init__(self, schedule: str, layout: Layout, costs: Costs, in_order: bool = False) -> None:
        self.schedule, self._layout, self._costs, self._in_order = schedule, layout, costs, in_order
        self._tables: dict[tuple[bool, int], Table] = {}

    @property
    def costs(self) -> Costs:
        return self._costs

    @costs.setter
    def costs(self, costs: Costs) -> None:
        self._costs = costs
        self._tables.clear()

    def training(self, num_microbatches: int) -> Table:
        """Forwards and backwards of every microbatch on every stage."""
        return self._table(True, num_microbatches)

    def evaluation(self, num_microbatches: int) -> Table:
        """Forwards alone."""
        return self._table(False, num_microbatches)

    def row(self, pp: int, num_microbatches: int, trains: bool) -> Row:
        """What a pp coordinate does."""
        return self._table(trains, num_microbatches)[pp]

    def _table(self, trains: bool, num_microbatches: int) -> Table:
        key = trains, num_microbatches
        if key not in self._tables:
            self._tables[key] = self._build(*key)
        return self._tables[key]

    def _build(self, trains: bool, num_microbatches: int) -> Table:
        layout = self._layout
        if not trains:
            return forward_only(layout.pp, layout.vp, num_microbatches, layout.placement)
        if self.schedule == AUTO:
            sizes = layout.pp, layout.vp, num_microbatches, layout.placement
            splits = splits_backward(AUTO, layout)
            return auto_schedule(self._costs, *sizes, splits_backward=splits, in_order=self._in_order)
        return build_schedule(self.schedule, layout.pp, layout.vp, num_microbatches)


def splits_backward(schedule: str, layout: Layout) -> bool:
    """Whether a schedule computes weight gradients apart from input gradients. One from costs does where it may."""
    return layout.zero < 3 if schedule == AUTO else SCHEDULES[schedule].splits_backward


def choose_schedule(name: str | None, layout: Layout) -> tuple[str, Layout]:
    """The schedule of a run, and the layout with the stages where that schedule has them.

    Args:
        name: as the user typed it; None for the usual one: 1F1B, or interleaved where ranks have several stages.
        layout: as the user typed it.

    Raises:
        ConfigurationError: there is no such schedule, or it cannot run the layout.
    """
    chosen = name or default_schedule(layout.vp)
    chunks = default_chunks(chosen)  # an unknown name is an error here
    if layout.pp == 1:
        return default_schedule(1), layout
    layout = replace(layout, vp=max(layout.vp, chunks))
    check_schedule(chosen, layout.pp, layout.vp, layout.microbatches)
    _check_split_backward(layout, chosen)
    return chosen, replace(layout, placement="loop" if chosen == AUTO else SCHEDULES[chosen].placement)


def _check_split_backward(layout: Layout, schedule: str) -> None:
    """A weight gradient that is computed later is added to a weight that is still there.

    Raises:
        ConfigurationError: under ZeRO-3 it is not. DeepSpeed gathers a layer's weights for its own backward alone, and between
            that and the next the parameter is empty.
    """
    if splits_backward(schedule, layout) and layout.zero == 3:
        raise ConfigurationError(
            f"parallel={layout}: schedule={schedule} computes weight gradients after the backward of their layer, and zero3 has "
            f"released the weights by then: use zero2, or schedule={default_schedule(layout.vp)}"
        )
