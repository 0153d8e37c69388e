"""Who waits for whom: an order in which all actions of a table can run, or the deadlock that prevents one."""

from __future__ import annotations

from lightning_par.pipeline.action import Action, Table, num_microbatches_of, num_stages_of, source_of


def source_keys(action: Action, num_stages: int, num_microbatches: int) -> tuple[int | None, int | None]:
    """Numbers of the result that an action consumes and of the one that it makes; `source_of` for many actions.

    A forward and a backward result each have one number for a stage and microbatch, so that B and I of the next stage
    are the same source. W makes nothing that another action consumes.
    """
    place = 2 * (action.stage * num_microbatches + action.microbatch)
    if action.kind == "F":
        return (place - 2 * num_microbatches if action.stage else None), place
    if action.kind == "W":
        return place + 1, None
    return (place + 2 * num_microbatches + 1 if action.stage < num_stages - 1 else place), place + 1


def execution_order(table: Table) -> list[int]:
    """The rank that runs the next action of its row, again and again, until all rows have ended.

    Raises:
        AssertionError: the table deadlocks; the message shows where each rank stands and what it waits for.
    """
    num_stages, num_microbatches = num_stages_of(table), num_microbatches_of(table)
    order: list[int] = []
    done: set[int | None] = {None}
    position = [0] * len(table)
    waiting: dict[int | None, list[int]] = {}  # result: ranks whose next action consumes it
    runnable = list(range(len(table)))
    while runnable:
        rank = runnable.pop()
        row = table[rank]
        while position[rank] < len(row):
            needed, made = source_keys(row[position[rank]], num_stages, num_microbatches)
            if needed not in done:
                waiting.setdefault(needed, []).append(rank)
                break
            done.add(made)
            position[rank] += 1
            order.append(rank)
            if made in waiting:
                runnable += waiting.pop(made)
    assert len(order) == sum(map(len, table)), f"the schedule deadlocks:\n{_draw_stuck(table, position)}"
    return order


def _draw_stuck(table: Table, position: list[int]) -> str:
    lines = []
    for rank, (row, done) in enumerate(zip(table, position, strict=True)):
        cells = [f"[{action}]" if i == done else str(action) for i, action in enumerate(row)]
        source = source_of(row[done], num_stages_of(table)) if done < len(row) else None
        lines.append(f"rank {rank}  {' '.join(cells)}   {f'waits for {source}' if source else 'ended'}")
    return "\n".join(lines)
