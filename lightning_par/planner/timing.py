"""The blocks of a module timed on a real device, each alone, installed as on one rank of every tp.

The other ranks of tp are imagined: their collectives do nothing. A block runs its forward (F), its backward without what can wait
(I) and the weight gradients that have waited (W), with 1, 2, 4, ... rows. The clock of a forward starts when the block has received
its input: the code before the blocks, which every stage runs, counts with the first one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from lightning_par.errors import ConfigurationError
from lightning_par.memory.matter import Solids
from lightning_par.memory.profile import ImaginedRank
from lightning_par.pipeline.action import Action, Kind
from lightning_par.pipeline.transport import Like
from lightning_par.plan import Plan
from lightning_par.plan.plan import Recompute
from lightning_par.planner.anatomy import Anatomy, Block, at
from lightning_par.planner.calibration import Series
from lightning_par.planner.candidate import MOST_ROWS
from lightning_par.runtime.axis import LocalAxis
from lightning_par.runtime.generator import generators_put_back
from lightning_par.runtime.nested import map_tensors

# the likeliest first, each with its share of the time: of what is computed again, only the backward differs
_SHARES: dict[Recompute, int] = {"none": 4, "full": 1, "selective": 1}
_KINDS: tuple[Kind, ...] = ("F", "I", "W")
_ROWS = [2**power for power in range(MOST_ROWS.bit_length())]
_LEAST, _MOST = 3, 20  # times that an action is timed, after one that makes ready what only a first one needs


@dataclass
class Timings:
    """What was timed.

    Attributes:
        series: of each action, by the digest of its work.
        left_out: what there was no time or no memory for, in words.
    """

    series: dict[str, Series] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


class Bench:
    """Where blocks are timed. One process.

    Args:
        anatomy: of the module.
        device: what computes.
        memory_bytes: of it that may be used.
        samples: gives a microbatch of any number of rows.
        say: told what is being done.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        device: torch.device,
        memory_bytes: int,
        samples: Callable[[int], Any],
        say: Callable[[str], None],
    ) -> None:
        self._anatomy, self._samples, self._say = anatomy, samples, say
        self._matter, self._memory_bytes = Solids(device, anatomy.precision), memory_bytes

    def time(self, devices_per_node: int, seconds: float) -> Timings:
        """Time over every tp of a node what can be timed in about so many seconds, a first look at the module not counted."""
        self._anatomy.body(1, False, "none")
        splits = _splits(self._anatomy, devices_per_node)
        found, deadline = Timings(), time.monotonic() + seconds
        passes = [(tp, sp, word) for word in _SHARES if word == "none" or self._anatomy.num_blocks for tp, sp in splits]
        with generators_put_back(), torch.compiler.set_stance("force_eager"):
            for number, (tp, sp, word) in enumerate(passes):
                share = _SHARES[word] / sum(_SHARES[word] for *_, word in passes[number:])
                self._time_body(tp, sp, word, found, deadline, share)
        return found

    def _time_body(self, tp: int, sp: bool, word: Recompute, found: Timings, deadline: float, share: float) -> None:
        """Time the different blocks of a body in a share of the time that is left, those first that there are most of."""
        if time.monotonic() >= deadline:
            found.left_out.append(f"no time for {_way(tp, sp, word)}")
            return
        body = self._anatomy.body(tp, sp, word)
        counts = Counter(map(id, body.blocks))
        blocks = {id(block): (stage, block) for stage, block in reversed(list(zip(body.stages, body.blocks, strict=True)))}
        parts = [_Part(body.plan, *blocks[key], _way(tp, sp, word)) for key, _ in counts.most_common()]
        parts = [part for part in parts if any(part.digest(kind) not in found.series for kind in _KINDS)]
        until = time.monotonic() + share * (deadline - time.monotonic())
        for index, part in enumerate(parts):
            if time.monotonic() >= deadline:
                found.left_out.append(f"no time for {part.name}")
                continue
            self._say(f"timing {part.name}")
            self._time(part, found, time.monotonic() + (until - time.monotonic()) / (len(parts) - index))
            if self._matter.device.type == "cuda":
                torch.cuda.empty_cache()

    def _time(self, part: _Part, found: Timings, until: float) -> None:
        """Time a block with more and more rows, as long as there is time and memory."""
        fitting = [rows for rows in _ROWS if part.num_bytes(rows) <= self._memory_bytes]
        series: dict[Kind, dict[int, float]] = {kind: {} for kind in _KINDS}
        try:
            for rows, seconds in self._measured(part, fitting, until):
                for kind in _KINDS:
                    series[kind][rows] = seconds[kind]
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            fitting = sorted(series["F"])
        if len(fitting) < len(_ROWS):
            found.left_out.append(f"no memory for {_ROWS[len(fitting)]} rows of {part.name}")
        for kind in _KINDS if series["F"] else ():
            found.series.setdefault(part.digest(kind), Series(f"{kind} of {part.name}", series[kind]))

    def _measured(self, part: _Part, fitting: Sequence[int], until: float) -> Iterator[tuple[int, dict[Kind, float]]]:
        """Numbers of rows with the seconds of each action, the first whatever time there is."""
        if not fitting:
            return
        axis, sent, seconds_of_all = LocalAxis("tp", part.plan.layout.tp, 0), dict[Action, list[Like]](), 0.0
        rank = self._anatomy.rank(part.plan, part.stage, axis, self._matter, self._samples(1), sent)
        watch = _Stopwatch(self._matter.device)
        rank.observers.append(watch)
        for rows in fitting:
            if rows > fitting[0] and time.monotonic() + 2 * seconds_of_all * (1 + _LEAST) > until:  # twice the rows, about
                return
            rank.batch = map_tensors(self._matter.given, self._samples(rows))
            sent.update(part.arriving(rows))
            seconds, seconds_of_all = _repeat(rank, watch, part.stage, until)
            yield rows, seconds


@dataclass(frozen=True)
class _Part:
    """A block to be timed.

    Attributes:
        plan: with every block as a stage.
        stage: the block's, the first of those that are equal.
        block: it.
        way: how the module is run, in words.
    """

    plan: Plan
    stage: int
    block: Block
    way: str

    @property
    def name(self) -> str:
        chain, its = self.plan.chain, self.plan.stages[self.stage]
        return f"{'the step' if chain is None or its.last - its.first > 1 else chain.blocks[its.first]}, {self.way}"

    def digest(self, kind: Kind) -> str:
        return self.block.work[kind].digest

    def num_bytes(self, rows: int) -> int:
        """With its weights, their gradients in float32, and as much again for what is passed on while they are made."""
        activations = max(self.block.stored(kind, rows).peak for kind in _KINDS)
        return activations + 3 * max(1, self.plan.stages[self.stage].parameter_bytes)

    def arriving(self, rows: int) -> dict[Action, list[Like]]:
        """What the block receives, where that is not what it expects."""
        few, more = self.block.received
        likes = [
            (tuple(round(at(rows, *sizes)) for sizes in zip(shape, other, strict=True)), dtype)
            for (shape, dtype), (other, _) in zip(few, more, strict=True)
        ]
        return {Action("F", self.stage, 0): likes} if likes else {}


class _Stopwatch:
    """An observer that times actions; on a GPU by the events of its stream, which wait for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._spans: dict[Kind, tuple[Any, Any]] = {}
        self._kind: Kind = "F"
        self._began: Any = None

    def begin(self, action: Action) -> None:
        self._kind, self._began = action.kind, self._now()

    def wait(self) -> None:
        """What is before an arrival does not count."""

    def arrive(self) -> None:
        self._began = self._now()

    def end(self) -> None:
        self._spans[self._kind] = self._began, self._now()

    def read(self) -> dict[Kind, float]:
        """Seconds of the last action of each kind."""
        if not self._is_gpu:
            return {kind: end - began for kind, (began, end) in self._spans.items()}
        torch.cuda.synchronize()
        return {kind: began.elapsed_time(end) * 1e-3 for kind, (began, end) in self._spans.items()}

    def _now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _repeat(rank: ImaginedRank, watch: _Stopwatch, stage: int, until: float) -> tuple[dict[Kind, float], float]:
    """Medians of the seconds of each action, in half of the time that is left, and the seconds of a run of all."""
    row = [Action(kind, stage, 0) for kind in _KINDS]
    until = time.monotonic() + (until - time.monotonic()) / 2
    rank.run(*row)
    watch.read()
    found, began = list[dict[Kind, float]](), time.monotonic()
    while len(found) < _LEAST or (len(found) < _MOST and time.monotonic() < until):
        rank.run(*row)
        found.append(watch.read())
    return {kind: median(each[kind] for each in found) for kind in _KINDS}, (time.monotonic() - began) / len(found)


def _splits(anatomy: Anatomy, devices_per_node: int) -> list[tuple[int, bool]]:
    """Every tp of a node that splits the module, with sp where the sequence can be cut; those that a search would try first."""
    found, others = list[tuple[int, bool]](), list[tuple[int, bool]]()
    for tp in (each for each in range(1, devices_per_node + 1) if devices_per_node % each == 0):
        ways = [sp for sp in (True, False) if _is_split(anatomy, tp, sp)]
        found += [(tp, sp) for sp in ways[:1]]
        others += [(tp, sp) for sp in ways[1:]]
    return found + others


def _is_split(anatomy: Anatomy, tp: int, sp: bool) -> bool:
    if tp == 1:
        return not sp
    try:
        return any(parameter.spec.split for parameter in anatomy.plan(tp, sp).parameters)
    except ConfigurationError:
        return False


def _way(tp: int, sp: bool, word: Recompute) -> str:
    return f"tp{tp}{'_sp' if sp else ''}{'' if word == 'none' else f', recompute={word}'}"


def _is_out_of_memory(error: RuntimeError) -> bool:
    """On a GPU or on a CPU, whose allocator raises nothing of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
