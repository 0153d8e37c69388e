"""Finding the chain: the container of equal blocks that makes up most of a model; and the blocks of others beside it."""

from __future__ import annotations

from torch import nn

from lightning_par.errors import PlanError


def find_chain(module: nn.Module, chosen: str | None = None) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """Path of the container of blocks, and every container looked at with the reason why it was not taken.

    The chain is the `nn.ModuleList` or `nn.Sequential` of at least two modules of one class with the most parameters.

    Args:
        module: the user's module.
        chosen: the path that the user's plan names, taken as it is.

    Raises:
        PlanError: ``chosen`` is not a container of blocks of this module.
    """
    containers = {name: child for name, child in module.named_modules() if isinstance(child, (nn.ModuleList, nn.Sequential))}
    if chosen is not None:
        if chosen not in containers:
            options = ", ".join(containers) or "none"
            raise PlanError(f"plan.chain={chosen}: no ModuleList or Sequential of that name; the module has: {options}")
        return chosen, ()
    seen: list[tuple[str, str]] = []
    best, best_numel = None, 0
    for name, container in containers.items():
        children = list(container)
        classes = sorted({type(child).__name__ for child in children})
        if len(children) < 2:
            seen.append((name, f"has {len(children)} module{'' if len(children) == 1 else 's'}"))
        elif len({id(child) for child in children}) < len(children):
            seen.append((name, "holds one module several times"))
        elif len(classes) > 1:
            seen.append((name, f"mixes {', '.join(classes)}"))
        elif (numel := sum(p.numel() for p in container.parameters())) <= best_numel:
            seen.append((name, f"{len(children)} x {classes[0]}, smaller"))
        else:
            if best is not None:
                seen.append((best, "smaller"))
            best, best_numel = name, numel
    return best, tuple(seen)


def other_blocks(module: nn.Module, chain: str) -> frozenset[str]:
    """Paths of the blocks outside the chain, such as those of an encoder where the decoder is the chain.

    They are the children, of one class and with modules of their own, of containers that neither hold the chain nor lie in it.
    Of containers inside one another the outermost counts.
    """
    found: list[str] = []
    for name, container in module.named_modules():
        is_apart = not any(_lies_in(name, other) or _lies_in(other, name) for other in (chain, *found))
        children = list(container.children()) if isinstance(container, (nn.ModuleList, nn.Sequential)) else []
        is_chain = len(children) > 1 and len({type(child) for child in children}) == 1
        if is_apart and is_chain and list(children[0].children()):
            found.append(name)
    return frozenset(f"{name}.{key}" if name else key for name in found for key, _ in module.get_submodule(name).named_children())


def _lies_in(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.") or other == ""
