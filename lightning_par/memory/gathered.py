"""The most bytes of parameters that a rank of ZeRO-3 has whole at once.

Gathered together are the parameters of a block, and those of each other module that has some of its own. They are released when its
forward is over, and gathered again for its backward. While they are gathered there are two copies of them: what has arrived, by
ranks, and the parameters, by name; of a single parameter it is one. Those of the modules that a module lies in are there too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from lightning_par.plan import Plan
from lightning_par.plan.plan import ParameterPlan


def most_gathered(plan: Plan, pp: int, held: Sequence[ParameterPlan]) -> int:
    """Bytes on a rank; of what a module borrows from another, none.

    Args:
        plan: all decisions.
        pp: the rank's coordinate.
        held: the parameters that it has.
    """
    blocks = () if plan.chain is None else plan.chain.blocks
    units = defaultdict[str, dict[str, ParameterPlan]](dict)
    for parameter in held:
        for alias, holders in parameter.aliases:
            if pp in holders:
                owner = next((block for block in blocks if alias.startswith(f"{block}.")), alias.rpartition(".")[0])
                units[owner][parameter.spec.name] = parameter
    return max((_arriving(plan, units[unit]) + sum(_around(plan, units, unit)) for unit in units), default=0)


def _around(plan: Plan, units: dict[str, dict[str, ParameterPlan]], unit: str) -> list[int]:
    """Of each module that has parameters of its own and in which ``unit`` lies."""
    outer = [units[owner] for owner in units if owner != unit and (not owner or unit.startswith(f"{owner}."))]
    return [sum(p.local_numel(plan.layout.tp) * p.itemsize for p in parameters.values()) for parameters in outer]


def _arriving(plan: Plan, parameters: dict[str, ParameterPlan]) -> int:
    """The copies of parameters that are gathered in one collective: padded to equal parts, and as they are."""
    dp = plan.layout.dp or 1
    sizes = [(parameter.local_numel(plan.layout.tp), parameter.itemsize) for parameter in parameters.values()]
    arrived = sum(-(-numel // dp) * dp * itemsize for numel, itemsize in sizes)
    return arrived if len(sizes) == 1 else arrived + sum(numel * itemsize for numel, itemsize in sizes)
