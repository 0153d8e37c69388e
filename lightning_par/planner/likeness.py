"""Which blocks of a chain are alike, and the module without those that are like another one: what is true of a few blocks of each
kind need not be found out for a hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_par.plan import Plan
from lightning_par.plan.plan import ParameterPlan


@dataclass(frozen=True)
class Likeness:
    """A chain and the blocks of it that stand for all.

    Attributes:
        paths: of all blocks.
        like: for each block the one that stands for it. The first and the last one stand for themselves: beside them is other code.
        names: of a parameter of each block that of the block that stands for it; of others there is none.
    """

    paths: tuple[str, ...]
    like: tuple[int, ...]
    names: dict[str, str]

    @classmethod
    def of(cls, module: nn.Module, plan: Plan) -> Likeness:
        """From a plan with every block as a stage."""
        assert plan.chain is not None
        paths, known, like = plan.chain.blocks, dict[object, int](), list[int]()
        for index, form in enumerate(_forms(module, plan)):
            is_end = index in (0, len(paths) - 1)
            like.append(index if is_end else known.setdefault(form, index))
        names = {
            f"{path}.{name}": f"{paths[other]}.{name}"
            for path, other in zip(paths, like, strict=True)
            for name, _ in module.get_submodule(path).named_parameters(remove_duplicate=False)
        }
        return cls(paths, tuple(like), names)

    @property
    def kept(self) -> list[int]:
        """The blocks that stand for themselves, in order."""
        return sorted(set(self.like))

    @contextmanager
    def shortened(self, module: nn.Module) -> Iterator[None]:
        """While it is entered, the module has no other blocks; names stay what they are. May be entered again inside."""
        containers = {path.rpartition(".")[0]: None for path in self.paths}
        before = [(container := module.get_submodule(path), dict(container._modules)) for path in containers]
        kept = set(self.kept)
        try:
            for index, path in enumerate(self.paths):
                owner, _, name = path.rpartition(".")
                if index not in kept:
                    module.get_submodule(owner)._modules.pop(name, None)
            yield
        finally:
            for container, modules in before:
                container._modules.clear()
                container._modules.update(modules)

    def extend(self, parameters: Sequence[ParameterPlan], whole: Sequence[ParameterPlan]) -> tuple[ParameterPlan, ...]:
        """The parameters of the whole module, split as those of the shortened one are.

        Raises:
            KeyError: one has no counterpart.
        """
        known = {parameter.spec.name: parameter.spec for parameter in parameters}
        found = []
        for parameter in whole:
            its = known[self.names.get(parameter.spec.name, parameter.spec.name)]
            found.append(replace(parameter, spec=replace(parameter.spec, split=its.split, partial=its.partial)))
        return tuple(found)


def find_likeness(module: nn.Module, whole: Plan, make_plan: Callable[[int], Plan]) -> tuple[Likeness, Plan] | None:
    """The blocks that stand for all and the plan of these alone, where the module does with them what it does with all.

    Args:
        module: the user's.
        whole: its plan, with every block as a stage.
        make_plan: the same of the module as it is then, which has so many blocks.

    Returns:
        None where all blocks differ, or where the module does not work, or does other things, without some.
    """
    likeness = Likeness.of(module, whole)
    kept = likeness.kept
    if len(kept) == len(likeness.paths):
        return None
    with likeness.shortened(module):
        try:
            short = make_plan(len(kept))
            likeness.extend(short.parameters, whole.parameters)
        except Exception:  # of the user's own code, too
            return None
        if short.chain is None or short.chain.blocks != tuple(likeness.paths[index] for index in kept):
            return None
        forms, mine = list(_forms(module, whole, kept)), list(_forms(module, short))
    return (likeness, short) if mine == forms else None


def _forms(module: nn.Module, plan: Plan, chosen: Sequence[int] | None = None) -> Iterator[tuple[Any, ...]]:
    """What is compared of blocks: their parameters, what they compute and store, how they are called and what they give."""
    chain = plan.chain
    assert chain is not None
    flops: dict[str, dict[str, int]] = {path: {} for path in chain.blocks}
    for name, count in plan.module_flops.items():
        owner = next((path for path in _prefixes(name) if path in flops), None)
        if owner is not None:
            flops[owner][name[len(owner) :]] = count
    for index in range(len(chain.blocks)) if chosen is None else chosen:
        path, stage = chain.blocks[index], plan.stages[index]
        block = module.get_submodule(path)
        received = plan.boundaries[index - 1] if index else ()
        yield (
            type(block),
            tuple((name, each.shape, each.dtype, each.requires_grad) for name, each in block.named_parameters()),
            (stage.num_parameters, stage.parameter_bytes, stage.flops, stage.saved_bytes),
            tuple(flops[path].items()),
            (chain.carry_argument[index], chain.outputs[index], chain.has_gradients[index]),
            tuple(replace(each, module=each.module.removeprefix(path)) for each in received),
        )


def _prefixes(name: str) -> Iterator[str]:
    """A module's path and those of its owners."""
    while name:
        yield name
        name = name.rpartition(".")[0]
