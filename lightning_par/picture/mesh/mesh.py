"""What a picture of the device mesh shows: every rank in its place, what it holds, and what each axis sends over which links."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lightning_par.layout import Layout
from lightning_par.plan import Plan
from lightning_par.plan.render import block_spans, format_bytes, listed
from lightning_par.plan.tree import module_tree

_GRADIENTS = {
    0: "gradients, summed once a step",
    1: "gradients to the rank that steps them, and new weights back, once a step",
    2: "gradients to the rank that keeps them, and new weights back, once a step",
    3: "weights, gathered wherever they are read, and gradients to the rank that keeps them",
}


@dataclass(frozen=True)
class Holding:
    """What the ranks at one pp coordinate hold.

    Attributes:
        stages: that they run.
        blocks: of the chain, in words; the whole module where there is none.
        facts: bytes by what they are for, in words; of weights before ZeRO partitions them where nothing else is known.
    """

    stages: tuple[int, ...]
    blocks: str
    facts: dict[str, str]

    @property
    def words(self) -> str:
        """``stages 0, 2; blocks.[0-1]; weights 3.0 KiB``."""
        facts = ", ".join(f"{name} {size}" for name, size in self.facts.items())
        return f"stage{'s' if len(self.stages) > 1 else ''} {listed(self.stages)}; {self.blocks}; {facts}"


@dataclass(frozen=True)
class Line:
    """Ranks that are drawn beside each other.

    Attributes:
        label: of the node or the pp coordinate that begins with them; empty where one goes on.
        ranks: global ranks, in order.
    """

    label: str
    ranks: range


@dataclass(frozen=True)
class MeshPicture:
    """All that is drawn.

    Attributes:
        title: of what.
        layout: sizes of the axes, dp filled in.
        devices_per_node: ranks on each node; None where that is not known.
        holdings: what ranks hold, by pp coordinate.
    """

    title: str
    layout: Layout
    devices_per_node: int | None
    holdings: tuple[Holding, ...]

    @property
    def summary(self) -> str:
        """How many ranks there are, and what is drawn together."""
        size, per_node = self.layout.world_size, self.devices_per_node
        nodes = f" on {_count(-(-size // per_node), 'node')} of {per_node}" if per_node else ""
        return f"{_count(size, 'rank')}{nodes}{', tp groups together' if self.layout.tp > 1 else ''}"

    @property
    def axes(self) -> dict[str, tuple[int, int]]:
        """Size of each axis, and how many global ranks it is from one of its ranks to the next; the nearest neighbours first."""
        tp, dp = self.layout.tp, self.layout.dp or 1
        return {"tp": (tp, 1), "dp": (dp, tp), "pp": (self.layout.pp, tp * dp)}

    @cached_property
    def links(self) -> dict[str, str]:
        """Where the ranks of each axis are and what they send, in words; of axes with more than one."""
        gathered = "gathered and " if self.layout.sp else ""
        sends = {
            "tp": f"activations and their gradients, {gathered}summed around each split layer",
            "dp": _GRADIENTS[self.layout.zero],
            "pp": "hidden states of each microbatch, and their gradients back",
        }
        return {
            name: f"{size} ranks{_apart(stride)}{self._where(size, stride)}: {sends[name]}"
            for name, (size, stride) in self.axes.items()
            if size > 1
        }

    def lines(self, longest: int) -> Iterator[Line]:
        """All ranks in order: a node begins a line, or a pp coordinate where nodes are not known; so do ``longest`` ranks.

        Args:
            longest: at most so many ranks in a line, or a whole tp group where that is longer.
        """
        layout = self.layout
        row = self.devices_per_node or layout.tp * (layout.dp or 1)
        label = "node" if self.devices_per_node else "pp"
        step = min(row, max(1, longest // layout.tp) * layout.tp)
        for number, start in enumerate(range(0, layout.world_size, row)):
            end = min(start + row, layout.world_size)
            for first in range(start, end, step):
                yield Line(f"{label} {number}" if first == start else "", range(first, min(first + step, end)))

    def _where(self, size: int, stride: int) -> str:
        """Whether an axis's neighbours share a node."""
        per_node = self.devices_per_node
        if per_node is None:
            return ""
        ranks = (rank for rank in range(self.layout.world_size) if rank // stride % size)
        inside = {rank // per_node == (rank - stride) // per_node for rank in ranks}
        return (
            ", inside nodes and between them" if len(inside) > 1 else ", inside a node" if inside == {True} else ", between nodes"
        )


def mesh_of(plan: Plan, devices_per_node: int | None) -> MeshPicture:
    """The picture of a plan's ranks.

    Args:
        plan: all decisions of a run.
        devices_per_node: ranks on each node; None where that is not known.
    """
    num_bytes = module_tree(plan).bytes_by_pp
    holdings = []
    for pp in range(plan.layout.pp):
        blocks = plan.module if plan.chain is None else block_spans([plan.chain.blocks[index] for index in plan.blocks_at(pp)])
        sizes = {"weights": num_bytes[pp]}
        if plan.memory:
            memory = plan.memory[pp]
            sizes = {name: getattr(memory, name) for name in ("parameters", "gradients", "states", "activations")}
            sizes["peak"] = memory.total
        facts = {name: format_bytes(size) for name, size in sizes.items()}
        holdings.append(Holding(plan.layout.stages_of(pp), blocks, facts))
    return MeshPicture(f"{plan.module}, {plan.layout}", plan.layout, devices_per_node, tuple(holdings))


def _apart(stride: int) -> str:
    return " side by side" if stride == 1 else f", {stride} apart"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
