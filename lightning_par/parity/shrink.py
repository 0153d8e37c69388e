"""A smaller copy of a model: fewer blocks of its chain, everything else as it is."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from lightning_par.plan import Plan

LARGE = 10_000_000  # parameters from which on a module is made smaller, unless the user says otherwise
_FEW = 2  # blocks of each container that are kept, so that it is seen as a chain, and one block gets what another one made


def is_large(module: nn.Module) -> bool:
    """Whether one process on a CPU would train the module for longer than anybody waits."""
    return sum(parameter.numel() for parameter in module.parameters()) >= LARGE


def shrink(module: nn.Module, plan: Plan, make_plan: Callable[[], Plan]) -> tuple[Plan, str]:
    """Take blocks from the end of each container of a module's chain, in place, where the module works without them.

    Args:
        module: the user's.
        plan: of the whole module.
        make_plan: makes the plan of the module as it is then.

    Returns:
        The plan of what is left, and what was done, for the user.
    """
    chain = plan.chain
    if chain is None:
        return plan, "full size: it has no chain of blocks to take some from"
    each = max(_FEW, math.ceil(plan.layout.num_stages / len(chain.paths)))
    spare = [block for path in chain.paths for block in _inside(path, chain.blocks)[each:]]
    total, kept = len(chain.blocks), len(chain.blocks) - len(spare)
    if not spare:
        return plan, f"full size: {total} blocks are as few as {plan.layout} can have"
    containers = [module.get_submodule(path) for path in chain.paths]
    before = [dict(container._modules) for container in containers]
    for block in spare:
        path, _, name = block.rpartition(".")
        del module.get_submodule(path)._modules[name]
    try:
        smaller = make_plan()
        if smaller.chain is not None and len(smaller.chain.blocks) == kept:
            return smaller, f"{kept} of its {total} blocks, all else in full; --full takes all"
        reason = "its chain is another one"
    except Exception as error:  # of the user's own code, too
        reason = str(error).strip().split("\n")[0] or type(error).__name__
    for container, modules in zip(containers, before, strict=True):
        container._modules.clear()
        container._modules.update(modules)
    return plan, f"full size: with {kept} of its {total} blocks it does not work ({reason})"


def _inside(path: str, blocks: tuple[str, ...]) -> list[str]:
    """The blocks of one container."""
    return [block for block in blocks if block.rpartition(".")[0] == path]
