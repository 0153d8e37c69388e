"""What each block of a module computes, stores and sends with one microbatch of any size, split over any tp.

The module is planned as if every block were a stage of its own, and one block of each kind is run on fake tensors by the executor,
installed as on its rank, with two and with three rows, from which every other number of rows follows. The first block has what
comes before the blocks with it, the last one what comes after. Where blocks are alike, the module is taken apart without the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_par.errors import ConfigurationError
from lightning_par.layout import Layout
from lightning_par.memory.matter import Fakes, Matter
from lightning_par.memory.optimizer import OptimizerForm
from lightning_par.memory.profile import ActionMemory, ImaginedRank, Loss
from lightning_par.pipeline.action import Action, Kind
from lightning_par.pipeline.transport import Like
from lightning_par.plan import Plan
from lightning_par.plan.nearest import untried
from lightning_par.plan.plan import ParameterPlan, Recompute
from lightning_par.planner.likeness import Likeness, find_likeness
from lightning_par.planner.work import Line, Work, WorkCounter
from lightning_par.prepare import prepare_plan
from lightning_par.private.torch import FakeTensorMode
from lightning_par.runtime.axis import Axis
from lightning_par.runtime.generator import generators_put_back
from lightning_par.runtime.imagined import ImaginedAxis
from lightning_par.runtime.precision import FULL, Precision

ROWS = (2, 3)  # of one row alone a view is contiguous that of more is none, and is not copied
_OF_ALL_BLOCKS = {"chain", "compile", "fp8"}  # lines of the plan section that treat all blocks alike
Say = Callable[[str], None]
_Sent = dict[Action, list[Like]]
_Seen = tuple[dict[Kind, Work], dict[Kind, ActionMemory], float, int]


@dataclass(frozen=True)
class Block:
    """One block, on each tp rank.

    Attributes:
        work: of each action; B, where it is not I and W one after the other, because collectives travel meanwhile.
        memory: of each action, with either number of `ROWS`.
        sent_bytes: what goes to the next block, with either.
        shared_bytes: what it stores of that any other block of its stage stores too, with either; see `ImaginedRank`.
        received: what the block gets, with either; nothing where it is not known to differ from what the block expects.
    """

    work: Mapping[Kind, Line]
    memory: tuple[Mapping[Kind, ActionMemory], Mapping[Kind, ActionMemory]]
    sent_bytes: tuple[float, float]
    shared_bytes: tuple[float, float] = (0, 0)
    received: tuple[Sequence[Like], Sequence[Like]] = ((), ())

    def stored(self, kind: Kind, rows: int) -> ActionMemory:
        """What an action does to the memory."""
        few, more = (memory[kind] for memory in self.memory)
        return ActionMemory(*(int(at(rows, getattr(few, name), getattr(more, name))) for name in ("before", "after", "peak")))

    def sent(self, rows: int) -> float:
        """Bytes to the next block."""
        return at(rows, *self.sent_bytes)

    def shared(self, rows: int) -> int:
        """Bytes that a stage stores once."""
        return int(at(rows, *self.shared_bytes))


@dataclass(frozen=True)
class Body:
    """A module split over tp.

    Attributes:
        tp: ranks that share a layer.
        parameters: of the whole module, with the blocks that hold them as pp coordinates.
        flops: forward operations of the dry run, by block.
        blocks: in order; without a chain the whole step is one.
        plan: of the blocks that stand for all, each a stage.
        stages: for each block the stage of that plan that stands for it.
    """

    tp: int
    parameters: tuple[ParameterPlan, ...]
    flops: tuple[int, ...]
    blocks: tuple[Block, ...]
    plan: Plan
    stages: tuple[int, ...]


class Anatomy:
    """Takes a module apart as far as it is asked. One process, no process group; the module is not changed.

    Args:
        module: the user's.
        pieces: a microbatch with either number of `ROWS`.
        loss_of: the loss in what the step returns.
        form: what the optimizer keeps.
        precision: of the run.
        overrides: the user's plan section.
        say: told what is being done.
    """

    def __init__(
        self,
        module: nn.Module,
        pieces: tuple[Any, Any],
        loss_of: Loss,
        form: OptimizerForm,
        precision: Precision = FULL,
        overrides: Mapping[str, Any] | None = None,
        say: Say = lambda words: None,
    ) -> None:
        self.form = form
        self._module, self._pieces, self._loss_of, self.precision = module, pieces, loss_of, precision
        self._overrides = {key: value for key, value in (overrides or {}).items() if key not in ("recompute", "stages", "costs")}
        self._say = say
        self._plans: dict[tuple[int, bool], Plan | ConfigurationError] = {}
        self._bodies: dict[tuple[int, bool, Recompute], Body] = {}
        whole = self._plan(Layout(dp=1, microbatches=1))
        self.num_blocks = 0 if whole.chain is None else len(whole.chain.blocks)
        self.pipeline_error: ConfigurationError | None = None
        self._likeness: Likeness | None = None
        self._whole = whole if self.num_blocks < 2 else self._try_pipeline(whole)
        self._plans[1, False] = self._whole
        if self.num_blocks > 1 and self.pipeline_error is None and self._overrides.keys() <= _OF_ALL_BLOCKS:
            self._shorten()

    def plan(self, tp: int, sp: bool) -> Plan:
        """The plan over tp with every block as a stage, of the blocks that stand for all.

        Raises:
            ConfigurationError: the module cannot be split this way.
        """
        if (tp, sp) not in self._plans:
            self._say(f"planning tp{tp}{'_sp' if sp else ''}")
            try:
                stages = len(self.plan(1, False).stages)
                with self._short():
                    self._plans[tp, sp] = self._plan(Layout(tp=tp, sp=sp, pp=stages, dp=1, microbatches=1))
            except ConfigurationError as error:
                self._plans[tp, sp] = error
        found = self._plans[tp, sp]
        if isinstance(found, ConfigurationError):
            raise found
        return found

    def body(self, tp: int, sp: bool, recompute: Recompute) -> Body:
        """The module over tp, taken apart.

        Raises:
            ConfigurationError: it cannot be split this way.
        """
        key = tp, sp, recompute
        if key not in self._bodies:
            plan = self.plan(tp, sp)
            self._say(f"running the blocks of tp{tp}{'_sp' if sp else ''}, recompute={recompute}")
            if plan.chain is not None:
                plan = replace(plan, chain=replace(plan.chain, recompute=(recompute,) * len(plan.chain.blocks)))
            with self._short():
                blocks = self._blocks(plan)
            parameters, stages = plan.parameters, tuple(range(len(blocks)))
            if self._likeness is not None:
                places = {index: place for place, index in enumerate(self._likeness.kept)}
                stages = tuple(places[index] for index in self._likeness.like)
                parameters = self._likeness.extend(parameters, self._whole.parameters)
            flops = tuple(stage.flops for stage in self._whole.stages)
            self._bodies[key] = Body(tp, parameters, flops, tuple(blocks[stage] for stage in stages), plan, stages)
        return self._bodies[key]

    def rank(self, plan: Plan, stage: int, tp: Axis, matter: Matter, piece: Any, sent: _Sent) -> ImaginedRank:
        """The rank of one block; see `ImaginedRank`."""
        run = (self._module, piece, plan)
        with self._short():
            return ImaginedRank(stage, tp, run, matter, sent, self._loss_of, True, self.precision, "training_step")

    def _plan(self, layout: Layout) -> Plan:
        with untried():  # the search tries them all
            return prepare_plan(self._module, self._pieces[0], layout, self._overrides, precision=self.precision)

    def _try_pipeline(self, whole: Plan) -> Plan:
        """The plan with every block as a stage, or of the whole where that cannot be."""
        try:
            return self._plan(Layout(pp=self.num_blocks, dp=1, microbatches=1))
        except ConfigurationError as error:
            self.pipeline_error = error
            return whole

    def _shorten(self) -> None:
        found = find_likeness(self._module, self._whole, lambda pp: self._plan(Layout(pp=pp, dp=1, microbatches=1)))
        if found is not None:
            self._likeness, self._plans[1, False] = found

    def _short(self) -> AbstractContextManager[None]:
        """Around whatever is done with the blocks that stand for all."""
        return nullcontext() if self._likeness is None else self._likeness.shortened(self._module)

    def _blocks(self, plan: Plan) -> tuple[Block, ...]:
        """Every block, of which equal ones are run once."""
        found: dict[object, tuple[int, Block]] = {}
        blocks = list[Block]()
        sent: tuple[_Sent, _Sent] = ({}, {})
        with generators_put_back(), torch.compiler.set_stance("force_eager"), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            for stage, its in enumerate(plan.stages):
                is_end = stage in (0, len(plan.stages) - 1)
                kind = stage if is_end else (its.num_parameters, its.parameter_bytes, its.flops, its.saved_bytes)
                if kind not in found:
                    found[kind] = stage, self._run(plan, stage, fake, sent)
                like, block = found[kind]
                for each in sent:  # an equal block passes on the same
                    if Action("F", like + 1, 0) in each:
                        each[Action("F", stage + 1, 0)] = each[Action("F", like + 1, 0)]
                blocks.append(block)
        return tuple(blocks)

    def _run(self, plan: Plan, stage: int, fake: FakeTensorMode, sent: tuple[_Sent, _Sent]) -> Block:
        few, more = (self._see(plan, stage, fake, piece, its) for piece, its in zip(self._pieces, sent, strict=True))
        works = {kind: Line(few[0][kind], more[0][kind], ROWS) for kind in few[0]}
        arrived_few, arrived_more = (each.get(Action("F", stage, 0), []) for each in sent)
        return Block(works, (few[1], more[1]), (few[2], more[2]), (few[3], more[3]), (arrived_few, arrived_more))

    def _see(self, plan: Plan, stage: int, fake: FakeTensorMode, piece: Any, sent: _Sent) -> _Seen:
        axis = ImaginedAxis("tp", plan.layout.tp, 0)
        rank = self.rank(plan, stage, axis, Fakes(fake, self.precision), piece, sent)
        memory, shared = rank.profile(stage), rank.shared_bytes
        counter = WorkCounter()
        watch = _Counting(counter)
        axis.watchers.append(counter.saw)
        rank.observers.append(watch)
        with counter:
            for kinds in (("F", "B"), ("F", "I", "W")) if axis.size > 1 else (("F", "I", "W"),):
                rank.run(*(Action(kind, stage, 0) for kind in kinds))
        leaving = sent.get(Action("F", stage + 1, 0), ())
        return watch.works, memory, float(sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in leaving)), shared


class _Counting:
    """An observer that has the work of each action counted apart."""

    def __init__(self, counter: WorkCounter) -> None:
        self._counter = counter
        self.works: dict[Kind, Work] = {}

    def begin(self, action: Action) -> None:
        self._counter.work = self.works[action.kind] = Work()

    def wait(self) -> None:
        """Nothing is waited for."""

    def arrive(self) -> None:
        """It is there."""

    def end(self) -> None:
        self._counter.work = None


def at(rows: int, few: float, more: float) -> float:
    """What a number is for ``rows`` rows, from what it is for either of `ROWS`."""
    return few + (rows - ROWS[0]) / (ROWS[1] - ROWS[0]) * (more - few)


def kinds_of(splits_backward: bool) -> Sequence[Kind]:
    """The actions of a backward."""
    return ("I", "W") if splits_backward else ("B",)
