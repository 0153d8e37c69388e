"""Where the chain is cut into stages: as the user says, else so that the dearest stage is as cheap as possible."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_par.errors import PlanError
from lightning_par.layout import Layout
from lightning_par.plan.override import Overrides
from lightning_par.plan.partition import partition_blocks
from lightning_par.trace import Trace


def cut_chain(trace: Trace, layout: Layout, overrides: Overrides) -> list[int]:
    """Blocks on each stage.

    The costs are the forward operations of the dry run, or the seconds of ``plan.costs``.

    Raises:
        PlanError: a line of the plan section does not fit the blocks.
    """
    num_stages = layout.num_stages
    if overrides.stages is not None:
        counts = list(overrides.stages)
        if len(counts) != num_stages or sum(counts) != trace.num_blocks:
            raise PlanError(
                f"plan.stages={counts}: parallel={layout} needs {num_stages} numbers of at least 1 (one for each stage) that add "
                f"up to the {trace.num_blocks} blocks of {trace.chain_name or 'the module'}: correct them, or leave the line out"
            )
        return counts
    if num_stages == 1:
        return [trace.num_blocks]
    seconds = overrides.seconds([block.path for block in trace.blocks])
    if seconds is not None:
        first, *costs, last = seconds
        return partition_blocks(costs, num_stages, first=first, last=last)
    flops, end = trace.flops, trace.num_blocks
    counted = [flops[2 * i + 1] + (flops[2 * i + 2] if i + 1 < end else 0) for i in range(end)]
    return partition_blocks(counted, num_stages, first=flops[0], last=flops[-1])


def unevenness(counts: Sequence[int], layout: Layout) -> tuple[str, ...]:
    """A note where stages cannot have the same number of blocks."""
    num_blocks, num_stages = sum(counts), len(counts)
    if num_blocks % num_stages == 0:
        return ()
    longest = max(counts)
    longer = [str(stage) for stage, count in enumerate(counts) if count == longest]
    names = f"stage {longer[0]} has" if len(longer) == 1 else f"stages {', '.join(longer)} have"
    even = [f"pp{pp}" for pp in range(2, num_blocks + 1) if num_blocks % (pp * layout.vp) == 0]
    near = sorted(even, key=lambda word: abs(int(word[2:]) - layout.pp))[:2]
    instead = f" or {' or '.join(near)}{f'_vp{layout.vp}' if layout.vp > 1 else ''}" if near else ""
    fewer = num_blocks - num_blocks % num_stages
    return (
        f"{num_blocks} blocks on {num_stages} stages: {names} {longest} blocks, others {min(counts)}; even would be {fewer} or "
        f"{fewer + num_stages} blocks{instead}",
    )
