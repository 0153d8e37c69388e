"""The most bytes of parameters that a rank of ZeRO-3 has whole at once.

Gathered together are the parameters of a block, and those of each other module that has some of its own. They are released when its
forward is over, and gathered again for its backward. While they are gathered there are two copies of them: what has arrived, by
ranks, and the parameters, by name; of a single parameter it is one. While a block runs, what is arriving of the next one takes the
place of the first copy. Those of the modules that a module lies in are there too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

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
    most = 0
    for unit in units:
        own, arriving = _gathered(plan, units[unit]), [units[block] for block in _beside(plan, unit) if block in units]
        ahead = max((_arrived(plan, parameters) for parameters in arriving), default=0)
        most = max(most, own + max(_copied(plan, units[unit]), ahead) + sum(_around(plan, units, unit)))
    return most


def _beside(plan: Plan, unit: str) -> list[str]:
    """The blocks before and after a block on its stage."""
    blocks = () if plan.chain is None else plan.chain.blocks
    stages = [blocks[stage.first : stage.last] for stage in plan.stages]
    return [block for stage in stages for pair in pairwise(stage) if unit in pair for block in pair if block != unit]


def _around(plan: Plan, units: dict[str, dict[str, ParameterPlan]], unit: str) -> list[int]:
    """Of each module that has parameters of its own and in which ``unit`` lies."""
    outer = [units[owner] for owner in units if owner != unit and (not owner or unit.startswith(f"{owner}."))]
    return [_gathered(plan, parameters) for parameters in outer]


def _gathered(plan: Plan, parameters: dict[str, ParameterPlan]) -> int:
    """The parameters as they are."""
    return sum(parameter.local_numel(plan.layout.tp) * parameter.itemsize for parameter in parameters.values())


def _arrived(plan: Plan, parameters: dict[str, ParameterPlan]) -> int:
    """What one collective gives of them: padded to equal parts."""
    dp = plan.layout.dp or 1
    sizes = [(parameter.local_numel(plan.layout.tp), parameter.itemsize) for parameter in parameters.values()]
    return sum(-(-numel // dp) * dp * itemsize for numel, itemsize in sizes)


def _copied(plan: Plan, parameters: dict[str, ParameterPlan]) -> int:
    """What there is beside the parameters when they have just arrived; a single one is a view of what has arrived."""
    return _arrived(plan, parameters) - (_gathered(plan, parameters) if len(parameters) == 1 else 0)
