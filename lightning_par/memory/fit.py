"""``recompute: auto``: as few blocks computed again as the memory of a device asks for.

The choices for the n blocks of a pp coordinate that are left open are levels, each less memory than the one before::

    0          nothing
    k          the first k blocks selective, which computes no costly product again
    n + k      the first k blocks full, the others selective

Where blocks are compiled there is no selective. Every coordinate gets the lowest level that fits, by bisection; a level counts as
fitting only where its own forecast says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from lightning_par.errors import ModelError
from lightning_par.layout import Layout
from lightning_par.plan import Plan
from lightning_par.plan.memory import RankMemory
from lightning_par.plan.nearest import use_smaller
from lightning_par.plan.plan import Recompute
from lightning_par.plan.render import format_bytes

Foresee = Callable[[Plan], tuple[RankMemory, ...]]


def fit_recompute(plan: Plan, open_blocks: Collection[int], budget: int, foresee: Foresee, asked: Layout | None = None) -> Plan:
    """The plan with `ChainPlan.recompute` decided for the blocks that are left open, and its `Plan.memory`.

    Args:
        plan: all other decisions; blocks that are left open say ``none``.
        open_blocks: their indices; none to check only.
        budget: bytes of each rank's device.
        foresee: what a plan's ranks store.
        asked: the layout as the user typed it; by default the plan's.

    Raises:
        ModelError: a rank stores more even at the highest level; says by how much, and what would fit.
    """
    ranks = [_Rank(plan, pp, open_blocks) for pp in range(plan.layout.pp)]
    plain = foresee(plan)
    lowest, highest = [0] * len(ranks), [rank.num_levels for rank in ranks]
    if all(memory.total <= budget for memory in plain):
        return _noted(replace(plan, memory=plain), ranks, lowest, plain, budget)
    least = foresee(_at(plan, ranks, highest)) if any(highest) else plain
    _check_fits(plan, least, budget, bool(open_blocks), asked or plan.layout)
    fitting = [0 if memory.total <= budget else level for memory, level in zip(plain, highest, strict=True)]
    while any(high - low > 1 for low, high in zip(lowest, fitting, strict=True)):
        tried = [(low + high) // 2 if high - low > 1 else high for low, high in zip(lowest, fitting, strict=True)]
        for pp, memory in enumerate(foresee(_at(plan, ranks, tried))):
            if fitting[pp] - lowest[pp] > 1:
                fits = memory.total <= budget
                lowest[pp], fitting[pp] = (lowest[pp], tried[pp]) if fits else (tried[pp], fitting[pp])
    chosen = _at(plan, ranks, fitting)
    return _noted(replace(chosen, memory=foresee(chosen)), ranks, fitting, plain, budget)


@dataclass(frozen=True)
class _Rank:
    """The levels of a pp coordinate.

    Attributes:
        plan: before anything is decided.
        pp: the coordinate.
        left_open: the blocks that are left open anywhere.
    """

    plan: Plan
    pp: int
    left_open: Collection[int]

    @property
    def blocks(self) -> list[int]:
        """The blocks that are left open here, those of its first stage first: they have the most microbatches in flight."""
        return [index for index in self.plan.blocks_at(self.pp) if index in self.left_open]

    @property
    def words(self) -> tuple[Recompute, ...]:
        """What may become of a block, in order."""
        return ("full",) if self.plan.compilation is not None else ("selective", "full")

    @property
    def num_levels(self) -> int:
        """The highest level."""
        return len(self.words) * len(self.blocks)

    def choice(self, level: int) -> dict[int, Recompute]:
        """What a level says of each block."""
        chosen: dict[int, Recompute] = {}
        for step in range(level):
            chosen[self.blocks[step % len(self.blocks)]] = self.words[step // len(self.blocks)]
        return chosen


def _at(plan: Plan, ranks: Sequence[_Rank], levels: Sequence[int]) -> Plan:
    """The plan with every coordinate at a level."""
    assert plan.chain is not None
    chosen = {index: word for rank, level in zip(ranks, levels, strict=True) for index, word in rank.choice(level).items()}
    recompute = tuple(chosen.get(index, word) for index, word in enumerate(plan.chain.recompute))
    return replace(plan, chain=replace(plan.chain, recompute=recompute))


def _noted(plan: Plan, ranks: Sequence[_Rank], levels: Sequence[int], plain: Sequence[RankMemory], budget: int) -> Plan:
    """The plan with notes that say what was chosen, why and by how much."""
    notes = []
    for rank, level, before, after in zip(ranks, levels, plain, plan.memory, strict=True):
        if not rank.blocks:
            continue
        found = f"recompute=auto: ranks at pp {rank.pp} store {format_bytes(before.total)} with no more blocks recomputed, "
        if level == 0:
            found += f"of the {format_bytes(budget)} that they have: none is"
        else:
            chosen = list(rank.choice(level).values())
            counts = [f"{chosen.count(word)} {word}" for word in rank.words if word in chosen]
            found += (
                f"{format_bytes(before.total - budget)} more than they have: of {len(rank.blocks)} blocks {' and '.join(counts)}, "
                f"with which they store {format_bytes(after.total)}"
            )
        notes.append(found)
    return replace(plan, notes=(*plan.notes, *notes))


def _check_fits(plan: Plan, least: Sequence[RankMemory], budget: int, is_auto: bool, asked: Layout) -> None:
    pp, most = max(enumerate(least), key=lambda entry: entry[1].total)
    if most.total <= budget:
        return
    kinds = ("parameters", "gradients", "states", "activations", "working", "gathered")
    parts = ", ".join(f"{kind} {format_bytes(size)}" for kind in kinds if (size := getattr(most, kind)))
    needed = -(-most.total * 1000 // 2**30) / 1000  # rounded up to thousandths
    smaller = f": {use}" if (use := use_smaller(asked)) else ""
    how = "recompute=auto: with every open block recomputed in full, " if is_auto else ""
    raise ModelError(
        f"memory_gib={budget / 2**30:.4g}: {how}ranks at pp {pp} of {plan.layout} store {format_bytes(most.total)} ({parts}), "
        f"{format_bytes(most.total - budget)} more than they have: memory_gib={needed:g} would fit, "
        f"or give more ranks to tp or pp, or cut the batch into more microbatches (mb){smaller}"
    )
