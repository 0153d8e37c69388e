"""The plan as a tree of the user's modules: what each of them holds, how it is split, and what it computes.

Modules without parameters have no line of their own: what they compute is on the line of the module around them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_par.plan.plan import LayerPlan, ParameterPlan, Plan


@dataclass(frozen=True)
class ModuleNode:
    """A module with parameters, or several equal ones in a row.

    Attributes:
        name: path below the module above it, such as ``attention``; ``blocks.[0-3]`` for four.
        paths: of the modules that it stands for.
        weight: how its own parameters are cut over tp, in words; or which module has them too, under the name that counts.
        activation: what its output is under tensor parallelism; empty where that is nothing special.
        stages: pp coordinates that hold a parameter in it.
        num_elements: of all parameters in it, before they are split; a tied one counts once.
        bytes_by_pp: bytes of its parameters on a rank at each pp coordinate, before ZeRO partitions them.
        flops: forward operations for the traced batch, over the tp ranks together.
        children: the modules in it.
    """

    name: str
    paths: tuple[str, ...]
    weight: str
    activation: str
    stages: tuple[int, ...]
    num_elements: int
    bytes_by_pp: tuple[int, ...]
    flops: int
    children: tuple[ModuleNode, ...]


def module_tree(plan: Plan) -> ModuleNode:
    """The whole module. Modules in a list that are equal and neighbours are one node, whatever stages they are on."""
    return _Modules(plan).node(("",), plan.module)


class _Modules:
    """The modules of a plan by path, with what they have themselves and what is in them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._layers = {layer.name: layer for layer in plan.layers}
        self._own: defaultdict[str, list[tuple[str, ParameterPlan]]] = defaultdict(list)
        self._children: defaultdict[str, dict[str, None]] = defaultdict(dict)  # in the order in which they are registered
        self._held: dict[str, dict[str, set[int]]] = {
            "": {}
        }  # by path and parameter: the pp coordinates that hold it for this module
        self._parameters = {parameter.spec.name: parameter for parameter in plan.parameters}
        # Names that do not count follow those that do: a head that is tied to the embedding comes after the blocks.
        names = [(place > 0, parameter, *alias) for parameter in plan.parameters for place, alias in enumerate(parameter.aliases)]
        for _, parameter, alias, stages in sorted(names, key=lambda name: name[0]):
            self._add(parameter, alias, stages)
        self._flops = self._flops_of_holders()
        self._forms: dict[str, tuple[object, ...]] = {}

    def node(self, paths: tuple[str, ...], name: str) -> ModuleNode:
        """The node of equal modules. One that has nothing but one child is drawn with it, as ``model.layers.[0-3]``."""
        first = paths[0]
        children = tuple(
            self.node(tuple(_joined(path, key) for path in paths for key in keys), in_row(keys)) for keys in self._rows(first)
        )
        if first and len(children) == 1 and not self._own[first] and not self._flops[first]:
            return replace(children[0], name=f"{name}.{children[0].name}")
        held: dict[str, set[int]] = {}
        for path in paths:
            for parameter, stages in self._held[path].items():
                held.setdefault(parameter, set()).update(stages)
        return ModuleNode(
            name,
            paths,
            self._weight(first),
            self._activation(first),
            tuple(sorted(set().union(*held.values()))),
            sum(self._parameters[parameter].local_numel(1) for parameter in held),
            tuple(
                sum(self._local_bytes(parameter) for parameter, stages in held.items() if pp in stages)
                for pp in range(self._plan.layout.pp)
            ),
            sum(self._flops[path] for path in paths) + sum(child.flops for child in children),
            children,
        )

    # ---------------------------------------------------------------------- reading the plan

    def _add(self, parameter: ParameterPlan, alias: str, stages: tuple[int, ...]) -> None:
        *keys, name = alias.split(".")
        for depth in range(len(keys) + 1):
            path = ".".join(keys[:depth])
            self._held.setdefault(path, {}).setdefault(parameter.spec.name, set()).update(stages)
            self._children[path].update(dict.fromkeys(keys[depth : depth + 1]))
        self._own[".".join(keys)].append((name, parameter))

    def _flops_of_holders(self) -> Counter[str]:
        flops: Counter[str] = Counter()
        for path, count in self._plan.module_flops.items():
            while path not in self._held:
                path = path.rpartition(".")[0]
            flops[path] += count
        return flops

    def _local_bytes(self, name: str) -> int:
        parameter = self._parameters[name]
        return parameter.local_numel(self._plan.layout.tp) * parameter.itemsize

    # ---------------------------------------------------------------------- equal modules

    def _rows(self, path: str) -> list[list[str]]:
        """The children of a module, equal ones with numbers in a row together."""
        rows: list[list[str]] = []
        for key in self._children[path]:
            if rows and self._follows(path, rows[-1][-1], key):
                rows[-1].append(key)
            else:
                rows.append([key])
        return rows

    def _follows(self, path: str, before: str, key: str) -> bool:
        return is_next(before, key) and self._form(_joined(path, before)) == self._form(_joined(path, key))

    def _form(self, path: str) -> tuple[object, ...]:
        """All that is drawn of a module but its path and its stages."""
        if path not in self._forms:
            own = (tuple(key for key, _ in self._own[path]), self._weight(path), self._activation(path))
            inner = tuple((key, self._form(_joined(path, key))) for key in self._children[path])
            self._forms[path] = (*own, self._flops[path], inner)
        return self._forms[path]

    # ---------------------------------------------------------------------- words

    def _weight(self, path: str) -> str:
        """``row: 128 x 512/2; bias whole: 128``: the first parameter, and those with which something else is done."""
        words: list[str] = []
        ways: set[object] = set()
        for key, parameter in self._own[path]:
            owner = parameter.spec.name.rpartition(".")[0]
            way, text = self._cut(parameter, path) if owner == path else (owner, f"tied to {owner or self._plan.module}")
            if way not in ways:
                words.append(f"{key} {text}" if words else text)
            ways.add(way)
        return "; ".join(words)

    def _cut(self, parameter: ParameterPlan, path: str) -> tuple[object, str]:
        """How a parameter is cut: what tells ways apart, and the words."""
        spec, split, tp = parameter.spec, parameter.spec.split, self._plan.layout.tp
        sizes = list(map(str, spec.shape))
        if split is None:
            layer = self._layers.get(path)
            why = f" ({layer.why})" if layer is not None and layer.kind == "replicate" and layer.why else ""
            return (None, spec.partial), f"whole: {_shape(sizes)}{why}{', gradient summed' if spec.partial else ''}"
        if len(split.segments) > 1:
            sizes[split.dim] = f"({'+'.join(map(str, split.segments))})"  # fused parts
        sizes[split.dim] += f"/{tp}"
        added = sum(-segment % tp for segment in split.segments)
        copied = f", in {'+'.join(map(str, split.copies))} copies" if split.copies else ""
        padded = f", padded by {added}" if added and not split.copies else ""
        return split.segments, f"{self._kind(parameter)}: {_shape(sizes)}{copied}{padded}"

    def _kind(self, parameter: ParameterPlan) -> str:
        """Of the layer that a parameter is cut for, which a module that reads it under another name need not be."""
        layers = (self._layers.get(alias.rpartition(".")[0]) for alias, _ in parameter.aliases)
        return next((layer.kind for layer in layers if layer is not None), "split")

    def _activation(self, path: str) -> str:
        layer: LayerPlan | None = self._layers.get(path)
        if layer is not None and layer.kind == "column":
            return layer.activation
        sequence = self._plan.sequence
        return f"sequence/{self._plan.layout.tp}" if sequence is not None and path in sequence.modules else ""


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def is_next(before: str, key: str) -> bool:
    """Whether two names of modules in a list are numbers in a row."""
    return before.isdigit() and key.isdigit() and int(key) == int(before) + 1


def in_row(keys: Sequence[str]) -> str:
    """``[0-3]`` for such names."""
    return f"[{keys[0]}-{keys[-1]}]" if len(keys) > 1 else keys[0]


def _shape(sizes: Sequence[str]) -> str:
    return " x ".join(sizes) or "one number"
