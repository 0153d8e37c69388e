"""Finding the chain: the containers of equal blocks that make up a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_par.errors import PlanError

_WORTH_JOINING = 0.1  # of the main container's parameters


@dataclass(frozen=True)
class Containers:
    """The containers of blocks of a module.

    Attributes:
        main: the one whose blocks must be a chain; None when there is none.
        others: containers of blocks outside of it.
        may_join: those of ``others`` that may be joined to the chain: small ones may not.
        must_join: those of ``others`` that the user has named as parts of the chain.
        seen: containers that were looked at, with the reason why each is not the main one.
    """

    main: str | None
    others: tuple[str, ...] = ()
    may_join: tuple[str, ...] = ()
    must_join: tuple[str, ...] = ()
    seen: tuple[tuple[str, str], ...] = ()


def find_containers(module: nn.Module, chosen: str | Sequence[str] | None = None, may_mix: bool = False) -> Containers:
    """The containers of the blocks: the main one, see `find_chain`, and others beside it, see `other_containers`.

    Args:
        module: the user's module.
        chosen: the path or the paths that the user's plan names, taken as they are.
        may_mix: whether blocks of several classes make a container too, where no other one is found.

    Raises:
        PlanError: ``chosen`` is not a container of blocks of this module.
    """
    if chosen is None:
        main, seen = find_chain(module, None, may_mix)
        others = () if main is None else other_containers(module, main)
        least = 0 if main is None else _WORTH_JOINING * _numel(module.get_submodule(main))
        return Containers(main, others, tuple(path for path in others if _numel(module.get_submodule(path)) >= least), seen=seen)
    named = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    for path in named:
        find_chain(module, path)
    main = max(named, key=lambda path: _numel(module.get_submodule(path)))
    must = tuple(path for path in named if path != main)
    beside = tuple(path for path in other_containers(module, main) if not any(_overlap(path, other) for other in must))
    return Containers(main, must + beside, must_join=must)


def find_chain(
    module: nn.Module, chosen: str | None = None, may_mix: bool = False
) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """Path of the main container of blocks, and every container looked at with the reason why it was not taken.

    It is the `nn.ModuleList` or `nn.Sequential` of at least two modules of one class with the most parameters; with ``may_mix``
    and without such a one, that of several classes with the most parameters. Raises as `find_containers`.
    """
    containers = {name: child for name, child in module.named_modules() if isinstance(child, (nn.ModuleList, nn.Sequential))}
    if chosen is not None:
        if chosen not in containers:
            options = ", ".join(containers) or "none"
            raise PlanError(f"plan.chain={chosen}: no ModuleList or Sequential of that name; the module has: {options}")
        return chosen, ()
    seen: dict[str, str] = {}
    mixed: list[str] = []
    best, best_numel = None, 0
    for name, container in containers.items():
        children = list(container)
        classes = sorted({type(child).__name__ for child in children})
        if len(children) < 2:
            seen[name] = f"has {len(children)} module{'' if len(children) == 1 else 's'}"
        elif len({id(child) for child in children}) < len(children):
            seen[name] = "holds one module several times"
        elif len(classes) > 1:
            seen[name] = f"mixes {', '.join(classes)}"
            mixed.append(name)
        elif (numel := _numel(container)) <= best_numel:
            seen[name] = f"{len(children)} x {classes[0]}, smaller"
        else:
            if best is not None:
                seen[best] = "smaller"
            best, best_numel = name, numel
    if best is None and may_mix and mixed:
        best = max(mixed, key=lambda name: _numel(containers[name]))
        del seen[best]
    return best, tuple(seen.items())


def other_containers(module: nn.Module, chain: str) -> tuple[str, ...]:
    """Containers of blocks beside the chain, such as that of an encoder where the decoder is the chain.

    Their children are of one class and have modules of their own. They neither hold the chain nor lie in it. Of containers
    inside one another the outermost counts.
    """
    found: list[str] = []
    for name, container in module.named_modules():
        is_apart = not any(_overlap(name, other) for other in (chain, *found))
        children = list(container.children()) if isinstance(container, (nn.ModuleList, nn.Sequential)) else []
        is_chain = len(children) > 1 and len({type(child) for child in children}) == 1
        if is_apart and is_chain and list(children[0].children()):
            found.append(name)
    return tuple(found)


def blocks_of(module: nn.Module, container: str) -> list[str]:
    """Paths of the blocks of a container, in its order."""
    return [f"{container}.{key}" if container else key for key in module.get_submodule(container)._modules]


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _overlap(name: str, other: str) -> bool:
    """Whether one of two modules lies in the other, or is it."""
    return _lies_in(name, other) or _lies_in(other, name)


def _lies_in(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.") or other == ""
