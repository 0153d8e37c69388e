"""The layout: how many ways a training run is split along each axis, and which rank sits where.

A layout is written as one word, tokens joined by ``_`` in any order::

    tp2_pp2_zero1      2-way tensor parallel, 2 pipeline stages, ZeRO stage 1 over what is left of the devices
    dp4_zero3          4 data-parallel replicas, everything sharded
    pp4_mb16           4 stages, every batch cut into 16 microbatches
    pp4_vp2            8 stages, two on each of 4 ranks
    tp4_sp             4-way tensor parallel, hidden states between the blocks cut along the sequence
    single             one process
    auto               whatever is quickest on the devices at hand, see `lightning_par.host.auto`

Degrees left out are 1; ``dp`` left out is what is left of the devices. This module imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from lightning_par.errors import LayoutError

TOKENS = {
    "tp": "tensor-parallel size",
    "pp": "pipeline-parallel size",
    "vp": "pipeline stages on each rank (virtual stages)",
    "dp": "data-parallel size (default: what is left of the devices)",
    "zero": "ZeRO stage, 0 to 3",
    "mb": "microbatches per batch",
}
FLAGS = {"sp": "sequence parallel: hidden states between the blocks are cut along the sequence, over tp"}
AUTO = "auto"
EXAMPLES = (
    "single", AUTO, "tp2", "tp4", "tp8", "tp2_sp", "pp2", "pp4", "dp2", "dp4_zero1", "dp4_zero2", "dp4_zero3", "tp2_pp2", "tp4_pp2",
    "tp2_zero1", "pp2_zero1", "pp2_mb8", "pp4_vp2", "tp2_pp2_zero1", "tp2_pp2_dp2_zero3", "tp8_pp4_zero1",
)  # fmt: skip
_TOKEN = re.compile(r"([a-z]+)(\d+)")

Placement: TypeAlias = Literal["loop", "v"]


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes of one run.

    Attributes:
        tp: ranks that share every split layer (tensor parallel).
        pp: ranks that share the stages of a pipeline (pipeline parallel).
        dp: data-parallel replicas; ``None`` until the number of devices is known.
        zero: ZeRO stage: 0 replicates, 1 shards optimizer states, 2 also gradients, 3 also parameters, over dp.
        microbatches: pieces a batch is cut into; ``None`` for twice the stages (or fewer, so that the batch divides).
        sp: whether hidden states between the blocks are cut along the sequence over the tp ranks (sequence parallel).
        vp: stages on each pp rank (virtual stages).
        placement: which stages those are, see `pp_of_stage`; follows from the schedule.
        auto: whether all that is still to be chosen.
    """

    tp: int = 1
    pp: int = 1
    dp: int | None = None
    zero: int = 0
    microbatches: int | None = None
    sp: bool = False
    vp: int = 1
    placement: Placement = "loop"
    auto: bool = False

    def __post_init__(self) -> None:
        if self.auto and replace(self, auto=False, dp=None) != Layout():
            raise LayoutError(f"parallel={replace(self, auto=False)} with auto, which chooses the sizes: leave one of them out")
        for axis, size in (("tp", self.tp), ("pp", self.pp), ("vp", self.vp), ("dp", self.dp), ("mb", self.microbatches)):
            if size is not None and (not isinstance(size, int) or size < 1):
                raise LayoutError(f"{axis}{size}: {TOKENS[axis]} must be an integer of at least 1")
        if self.zero not in (0, 1, 2, 3):
            raise LayoutError(f"zero{self.zero}: the ZeRO stage must be 0, 1, 2 or 3")
        if self.sp and self.tp == 1:
            raise LayoutError("sp cuts the sequence over the tensor-parallel ranks, and tp is 1: add tp2 or more, or leave sp out")
        if self.vp > 1 and self.pp == 1:
            raise LayoutError(f"vp{self.vp} gives each pipeline rank several stages, and pp is 1: add pp2 or more, or leave vp out")

    def __str__(self) -> str:
        if self.auto:
            return AUTO
        parts = [f"tp{self.tp}"] if self.tp > 1 else []
        parts += ["sp"] if self.sp else []
        parts += [f"{axis}{size}" for axis, size in (("pp", self.pp), ("vp", self.vp), ("dp", self.dp or 1)) if size > 1]
        parts += [f"zero{self.zero}"] if self.zero else []
        parts += [f"mb{self.microbatches}"] if self.microbatches else []
        return "_".join(parts) or "single"

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model: tp x pp."""
        return self.tp * self.pp

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline: pp x vp."""
        return self.pp * self.vp

    def pp_of(self, stage: int) -> int:
        """The pp coordinate that runs a stage."""
        return pp_of_stage(stage, self.pp, self.placement)

    def stages_of(self, pp: int) -> tuple[int, ...]:
        """The stages that run at a pp coordinate, ascending."""
        turns = range(0, self.num_stages, self.pp)
        return tuple(first + self.pp_of(first + pp) for first in turns)  # in a turn back and forth are the same

    @property
    def last_pp(self) -> int:
        """The pp coordinate of the last stage, where the loss is."""
        return self.pp_of(self.num_stages - 1)

    @property
    def world_size(self) -> int:
        """Ranks of the whole run; dp counts as 1 while unknown."""
        return self.model_size * (self.dp or 1)

    def resolve(self, num_devices: int, typed: str | None = None) -> Layout:
        """The layout with dp filled in for ``num_devices`` processes.

        Args:
            num_devices: processes of the run, over all nodes.
            typed: the word as the user typed it, for the error.

        Raises:
            LayoutError: the degrees do not divide the devices; names the nearest layouts that do.
        """
        typed = typed or str(self)
        if self.dp is not None and self.world_size == num_devices:
            return self
        if self.dp is None and num_devices % self.model_size == 0:
            return replace(self, dp=num_devices // self.model_size)
        plural = "process" if num_devices == 1 else "processes"
        if self.dp is not None:
            rule = f"needs {self.world_size} processes ({self._product()})"
        else:
            rule = f"needs a multiple of {self.model_size} processes (tp {self.tp} x pp {self.pp})"
        near = " or ".join(f"parallel={layout}" for layout in nearest_layouts(self, num_devices))
        fit = self.world_size if self.dp is not None else self.model_size * max(1, round(num_devices / self.model_size))
        raise LayoutError(f"parallel={typed} {rule}, the trainer has {num_devices} {plural}: use {near} or devices={fit}")

    def _product(self) -> str:
        return f"tp {self.tp} x pp {self.pp} x dp {self.dp or 1}"

    def rank_of(self, pp: int, dp: int, tp: int) -> int:
        """Global rank at a coordinate. tp varies fastest, then dp, then pp, so that tp peers are neighbours on a node."""
        return (pp * (self.dp or 1) + dp) * self.tp + tp

    def coordinate_of(self, rank: int) -> Coordinate:
        """Coordinate of a global rank; the inverse of `rank_of`."""
        dp_size = self.dp or 1
        return Coordinate(pp=rank // (self.tp * dp_size), dp=rank // self.tp % dp_size, tp=rank % self.tp)


@dataclass(frozen=True)
class Coordinate:
    """Where a rank sits on each axis."""

    pp: int
    dp: int
    tp: int

    def __str__(self) -> str:
        return f"pp {self.pp}, dp {self.dp}, tp {self.tp}"


def pp_of_stage(stage: int, pp: int, placement: Placement) -> int:
    """The pp coordinate that runs a stage, of ``pp`` ranks with any number of stages each.

    ``loop`` goes round the ranks again and again (Megatron-LM, arXiv 2104.04473, section 2.2), ``v`` there and back
    (arXiv 2405.15362, section 3)::

        pp             0     1     2     3
        loop, vp 2    0 4   1 5   2 6   3 7
        v,    vp 2    0 7   1 6   2 5   3 4
    """
    turn, place = divmod(stage, pp)
    return pp - 1 - place if placement == "v" and turn % 2 else place


def parse_layout(word: str) -> Layout:
    """Read a layout word.

    Raises:
        LayoutError: an unknown, repeated or out-of-range token, with words that are close and right.
    """
    if word == "single":
        return Layout(dp=1)
    if word == AUTO:
        return Layout(auto=True)
    sizes: dict[str, int] = {}
    flags: set[str] = set()
    for token in word.split("_"):
        if token in FLAGS and token not in flags:
            flags.add(token)
            continue
        match = _TOKEN.fullmatch(token)
        if match is None or match[1] not in TOKENS:
            raise LayoutError(f"parallel={word}: '{token}' is given twice" if token in flags else _unknown(word, token))
        axis, size = match[1], int(match[2])
        if axis in sizes:
            raise LayoutError(f"parallel={word}: '{axis}' is given twice ({axis}{sizes[axis]} and {token}): keep one of them")
        sizes[axis] = size
    try:
        return Layout(
            tp=sizes.get("tp", 1),
            pp=sizes.get("pp", 1),
            dp=sizes.get("dp"),
            zero=sizes.get("zero", 0),
            microbatches=sizes.get("mb"),
            sp="sp" in flags,
            vp=sizes.get("vp", 1),
        )
    except LayoutError as error:
        raise LayoutError(f"parallel={word}: {error}") from None


def looks_like_layout(word: str) -> bool:
    """Whether some token of ``word`` is a known axis with a number, so that the rest is a typing error."""
    return any(token in FLAGS or ((match := _TOKEN.fullmatch(token)) and match[1] in TOKENS) for token in word.split("_"))


def nearest_layouts(layout: Layout, num_devices: int, count: int = 2, fits: Callable[[Layout], bool] | None = None) -> list[Layout]:
    """The layouts nearest to ``layout`` that use exactly ``num_devices`` ranks, by how far each degree moves.

    Args:
        count: at most so many.
        fits: what they must fulfil besides.
    """

    def distance(candidate: Layout) -> tuple[float, int]:
        pairs = ((candidate.tp, layout.tp), (candidate.pp, layout.pp), (candidate.dp or 1, layout.dp or 1))
        return sum(max(a, b) / min(a, b) - 1 for a, b in pairs), abs(candidate.tp - layout.tp)

    degrees = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    legal = [
        replace(layout, tp=tp, pp=pp, dp=num_devices // (tp * pp), sp=layout.sp and tp > 1, vp=layout.vp if pp > 1 else 1)
        for tp in degrees
        for pp in degrees
        if num_devices % (tp * pp) == 0
    ]
    return sorted(filter(fits, legal), key=distance)[:count]


def _unknown(word: str, token: str) -> str:
    known = ", ".join([*(f"{axis}N" for axis in TOKENS), *FLAGS])
    close = difflib.get_close_matches(word, EXAMPLES, n=3, cutoff=0.3) or list(EXAMPLES[:3])
    return (
        f"parallel={word}: unknown token '{token}'; a layout is 'single', 'auto' or tokens joined by '_' out of {known}. "
        f"Did you mean {', '.join(close)}?"
    )
