"""Stage 3 gathers the next unit while one computes.

DeepSpeed looks ahead along a trace of whole steps, which a pipeline's stage does not have: its forwards end by an exception, and
its microbatches come in the order of the schedule. What follows a unit within one forward, or within one backward, is the same
in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class GatheringAhead:
    """Begins to gather the unit that came next last time, as soon as one is there.

    Every dp rank runs the same units in the same order, and so gathers ahead in the same order. While a unit computes, what has
    arrived of the next one takes the place of what had arrived of its own: the most that is there at once is as without it.

    Args:
        coordinator: who gathers the parameters of a module before its forward and its backward.
        units: modules whose parameters are gathered all at once.
        parameters_of: what is gathered for a module.
    """

    def __init__(
        self, coordinator: Any, units: Iterable[nn.Module], parameters_of: Callable[[nn.Module], Iterable[nn.Parameter]]
    ) -> None:
        self._coordinator, self._units, self._parameters_of = coordinator, set(units), parameters_of
        self._next: dict[tuple[nn.Module, bool], nn.Module] = {}  # by unit, and whether in a backward
        self._last: tuple[nn.Module, bool] | None = None
        self._in_flight = coordinator._PartitionedParameterCoordinator__inflight_param_registry
        fetch = coordinator.fetch_sub_module

        def fetch_and_go_ahead(module: nn.Module, forward: bool) -> None:
            fetch(module, forward=forward)
            if module in self._units:
                self._go_ahead(module, forward)

        coordinator.fetch_sub_module = fetch_and_go_ahead

    def forget(self) -> None:
        """After a forward and after a backward: release what was gathered for a unit that did not come. Collective over dp."""
        self._last = None
        self._coordinator._clean_inflight_param_registry()

    def arrive(self, parameter: Any) -> None:
        """Wait for a parameter that is being gathered."""
        self._in_flight.pop(parameter).wait()

    def _go_ahead(self, unit: nn.Module, forward: bool) -> None:
        here = unit, torch._C._current_graph_task_id() != -1  # a recomputation is a forward in a backward
        if self._last is not None and self._last != here and self._last[1] == here[1]:
            self._next[self._last] = unit
        self._last = here
        coming: set[Any] = set(self._parameters_of(self._next[here])) if here in self._next else set()
        # of several, each is empty until all have arrived; a single one would have wrong values, if code outside the unit read it
        if sum(parameter.ds_status.name == "NOT_AVAILABLE" for parameter in coming) > 1:
            self._coordinator._PartitionedParameterCoordinator__all_gather_params(coming, forward)
