"""A table made for the costs of the stages: what makes uneven stages good."""

from __future__ import annotations

from itertools import product

from lightning_par.errors import ConfigurationError
from lightning_par.layout import Placement
from lightning_par.pipeline.action import Table
from lightning_par.pipeline.schedules import SCHEDULES, build_schedule
from lightning_par.pipeline.schedules.justify import justify
from lightning_par.pipeline.schedules.priority import Policy, schedule_by_priority
from lightning_par.pipeline.schedules.problem import Problem
from lightning_par.pipeline.simulate import Costs, peak_in_flight, simulate
from lightning_par.pipeline.validate import keeps_order

_NUM_JUSTIFIED = 4


def auto_schedule(
    costs: Costs,
    num_ranks: int,
    num_chunks: int,
    num_microbatches: int,
    placement: Placement = "loop",
    memory_cap: float | None = None,
    splits_backward: bool = True,
    in_order: bool = False,
) -> Table:
    """The shortest table that is found for ``costs``, by the simulator: never longer than a named schedule's.

    The candidates are the named schedules for this placement and number of stages that keep the cap, and tables by list
    scheduling under several policies; the shortest few are then justified. Each rank computes it alone from the same
    costs: nothing is random, so all have the same table.

    Args:
        costs: time of each action, by stage.
        num_ranks: ranks of the pipeline.
        num_chunks: stages on each.
        num_microbatches: pieces of the batch.
        placement: which stages are on which rank.
        memory_cap: how many microbatches' activations a rank may hold, counted to the end of B or W; by default as many as
            1F1B, interleaved 1F1B or ZB-V would, by the number and the placement of the stages.
        splits_backward: whether backwards may run as I and W.
        in_order: whether messages must be taken in the order in which they are sent, see `keeps_order`.

    Raises:
        ConfigurationError: the cap has no room for one microbatch.
    """
    if memory_cap is None:
        memory_cap = default_memory_cap(num_ranks, num_chunks, num_microbatches, placement)
    if memory_cap < 1:
        raise ConfigurationError(
            f"schedule=auto with a memory cap of {memory_cap:g} microbatches: a rank must hold the activations of at least one: "
            "use 1 or more"
        )
    most_held = int(memory_cap * num_chunks + 1e-6)
    problem = Problem(costs, num_ranks, num_chunks, num_microbatches, placement, most_held, splits_backward)
    tables = [*_named_tables(problem), *(schedule_by_priority(problem, policy) for policy in _policies(problem))]
    if in_order:
        tables = [table for table in tables if keeps_order(table)]
    by_length = {_seconds(table, costs): table for table in reversed(tables)}  # of two equal ones the earlier in the list
    shortest = [by_length[length] for length in sorted(by_length)]
    justified = [justify(problem, table) for table in shortest[:_NUM_JUSTIFIED] if _splits(table) == splits_backward]
    if in_order:
        justified = [table for table in justified if keeps_order(table)]
    return min([*shortest[:1], *justified], key=lambda table: _seconds(table, costs))


def default_memory_cap(num_ranks: int, num_chunks: int, num_microbatches: int, placement: Placement) -> float:
    """The activations that the usual schedule for these stages holds on its fullest rank, in microbatches of a rank."""
    if placement == "loop" and num_chunks > 1:
        return max(map(peak_in_flight, build_schedule("interleaved", num_ranks, num_chunks, num_microbatches)))
    return min(num_ranks, num_microbatches)


def _named_tables(problem: Problem) -> list[Table]:
    tables = []
    for schedule in SCHEDULES.values():
        fits = problem.num_chunks == 1 or schedule.placement == problem.placement
        if fits and schedule.has_chunks(problem.num_chunks) and (problem.splits_backward or not schedule.splits_backward):
            table = schedule.build(problem.num_ranks, problem.num_chunks, problem.num_microbatches)
            if max(map(peak_in_flight, table)) * problem.num_chunks <= problem.most_held + 1e-6:
                tables.append(table)
    return tables


def _policies(problem: Problem) -> list[Policy]:
    """Those that made the shortest table for some of many random costs; several stages of a rank fill each other's gaps."""
    if problem.num_chunks > 1:
        return [Policy(*choice) for choice in product((False, True), (False, True), (0.0, 1.0), (0.0,))]
    patiences = (0.0, 0.5) if problem.splits_backward else (0.0,)
    return [Policy(*choice) for choice in product((False, True), (False,), (0.0, 0.5, 1.0), patiences)]


def _seconds(table: Table, costs: Costs) -> float:
    return simulate(table, costs).makespan_seconds


def _splits(table: Table) -> bool:
    return any(action.kind == "W" for row in table for action in row)
