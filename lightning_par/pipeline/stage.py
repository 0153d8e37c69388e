"""The user's step as the program of a pipeline stage.

Every rank calls the user's own step once for each microbatch and each of its stages. The code before the blocks runs on
every stage. At the call of a stage's first block, what earlier stages have made takes the place of what this code made of
placeholders; the call of the first block of the next stage ends the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from lightning_par.errors import ModelError
from lightning_par.pipeline.arrival import Arrival
from lightning_par.pipeline.blocks import Blocks, Seen, see_output
from lightning_par.plan.plan import CarriedPlan, Plan

Receive = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class StageExit(BaseException):
    """Carries what crosses, its argument, out of the user's step; not an Exception, so that no handler of the user's stops it."""


class Carry(Protocol):
    """In which form a hidden state is between the blocks of a rank, where it is not the plain whole tensor."""

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the first block gets, from what the code before it made."""

    def like(self, hidden: torch.Tensor) -> torch.Tensor:
        """A tensor with the shape and dtype in which ``hidden`` travels between stages."""

    def arrive(self, received: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What a later stage's first block gets, from what has travelled; ``hidden`` has the whole shape."""

    def leave(self, hidden: torch.Tensor) -> torch.Tensor:
        """What travels, from what the last block gave."""


class Plain(Carry):
    """The hidden state as it is."""

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def like(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def arrive(self, received: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return received

    def leave(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@dataclass(frozen=True)
class Cut:
    """One stage.

    Attributes:
        stage: its number.
        first, last: its blocks, from ``first`` up to but not including ``last``.
        arriving: what it receives beside the hidden state; empty on the first stage.
        leaving: what it sends beside the hidden state; empty on the last one.
        arriving_returns, leaving_returns: whether a gradient goes back of each of these, the hidden state first.
        is_bare: whether the code before its first block runs without gradients; see [Note: in the place of]. Not where
            reentrant checkpointing turns gradients off around the blocks, and on again behind them.
    """

    stage: int
    first: int
    last: int
    arriving: tuple[CarriedPlan, ...] = ()
    leaving: tuple[CarriedPlan, ...] = ()
    arriving_returns: tuple[bool, ...] = (True,)
    leaving_returns: tuple[bool, ...] = (True,)
    is_bare: bool = False


class StageProgram:
    """The stages of one rank, cut out of a module in place.

    Args:
        module: the user's module.
        plan: all decisions.
        stages: the rank's stages.
        carry: the form of the hidden state between the blocks.
        whole: makes plain whole tensors of those that are cut over tp.

    Attributes:
        cuts: all stages of the pipeline.
        blocks: the calls of the blocks; None where they are the user's own.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        stages: Sequence[int],
        carry: Carry | None = None,
        whole: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> None:
        self.stages, self.carry, self.whole = tuple(stages), carry or Plain(), whole
        self.cuts = [_cut(plan, stage) for stage in range(len(plan.stages))]
        self.blocks: Blocks | None = None
        if plan.chain is not None and (len(self.cuts) > 1 or carry is not None):
            self.blocks = Blocks(module, plan.chain, any(plan.boundaries), self._changed(), self._watched())
            if len(self.cuts) == 1:
                self.blocks.runner = _StageRun(self, 0, Arrival(), None)

    def is_told(self, stage: int) -> bool:
        """Whether a stage must be told the shapes of what it receives: it makes a hidden state of the same shape, and no more."""
        return bool(self.cuts[stage].arriving) or (self.blocks is not None and not self.blocks.chain.keeps_shape)

    def run(
        self,
        stage: int,
        program: Callable[[], Any],
        receive: Receive | None,
        arrival: Arrival,
        at_entrance: Callable[[], None] = lambda: None,
    ) -> tuple[Any, list[torch.Tensor]]:
        """Run the step once.

        Args:
            stage: for which of the rank's stages.
            program: calls the user's step.
            receive: gives what the stage before sent, for tensors of its shapes and dtypes; None on the first stage.
            arrival: keeps it.
            at_entrance: called where the blocks of a later stage begin.

        Returns:
            What the step returned and nothing on the last stage; None and what crosses, the hidden state first, on the others.
        """
        needs_grad = torch.is_grad_enabled()
        self._set_runner(_StageRun(self, stage, arrival, receive, needs_grad, at_entrance))
        try:
            with torch.set_grad_enabled(needs_grad and not self.cuts[stage].is_bare):
                return program(), []
        except StageExit as leaving:
            (crossing,) = leaving.args
            return None, crossing
        finally:
            self._set_runner(None)

    @contextmanager
    def backward(self, stage: int, arrival: Arrival, at_entrance: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Around a backward, in which checkpointing may run blocks of ``stage`` again."""
        self._set_runner(_StageRun(self, stage, arrival, None, True, at_entrance, is_again=True))
        try:
            yield
        finally:
            self._set_runner(None)

    def _set_runner(self, run: _StageRun | None) -> None:
        if self.blocks is not None and len(self.cuts) > 1:
            self.blocks.runner = run

    def _changed(self) -> list[int]:
        """Blocks inside the only stage of a rank are called as they were, but for the last one of all, after which a pass ends."""
        mine, last = self.cuts[self.stages[0]], self.cuts[-1].last - 1
        inner = set(range(mine.first + 1, mine.last)) - {last} if len(self.stages) == 1 else set()
        return [index for index in range(last + 1) if index not in inner]

    def _watched(self) -> list[str]:
        """Modules that return what crosses. Blocks that are passed over show it by themselves."""
        return sorted({carried.module for cut in self.cuts for carried in cut.arriving if carried.place == "output"})


@dataclass(slots=True)
class _StageRun:
    """A step of one stage, or a backward that runs its blocks again, in progress.

    Attributes:
        arrival: keeps what is received.
        receive: gets it, for the tensors whose place it takes; None in a backward.
        needs_grad: whether this step trains.
        is_again: whether it is a backward.
    """

    program: StageProgram
    stage: int
    arrival: Arrival
    receive: Receive | None
    needs_grad: bool = False
    at_entrance: Callable[[], None] = lambda: None
    is_again: bool = False
    seen: Seen = field(default_factory=dict)
    cut: Cut = field(init=False)
    num_passed: int = field(init=False)

    def __post_init__(self) -> None:
        self.cut = self.program.cuts[self.stage]
        self.num_passed = max(0, self.cut.first - 1)  # the last one that is passed over turns gradients on

    def call_block(self, index: int, through: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        blocks, cut = self.program.blocks, self.cut
        assert blocks is not None
        if index < cut.first:
            return self._pass_over(blocks, index, args, kwargs)
        if index == cut.first:
            return blocks.call_with(index, self._enter(blocks, args, kwargs), through, args, kwargs)
        if index < cut.last:
            return through(*args, **kwargs)
        hidden, sides = blocks.hidden(index, args, kwargs), blocks.find(cut.leaving, self.seen, args, kwargs)
        raise StageExit([self.program.carry.leave(hidden), *map(self.program.whole, sides)])

    def _pass_over(self, blocks: Blocks, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of a block of an earlier stage."""
        requires_grad = self.needs_grad and index == self.cut.first - 1
        if requires_grad and self.cut.is_bare:
            torch.set_grad_enabled(True)  # until the step ends
        output = blocks.pass_over(index, args, kwargs, requires_grad)
        self.see(blocks.chain.blocks[index], output)
        return output

    def see(self, module: str, output: Any) -> None:
        carried = self.cut.arriving + self.cut.leaving
        if carried and not self.is_again:
            see_output(self.seen, carried, module, output)

    def _enter(self, blocks: Blocks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The hidden state for the stage's first block."""
        carry, hidden = self.program.carry, blocks.hidden(self.cut.first, args, kwargs)
        if self.stage == 0:
            return carry.enter(hidden)
        if self.receive is not None:
            self._arrive(blocks, self.receive, hidden, args, kwargs)
        self.at_entrance()
        assert self.arrival.hidden is not None
        return carry.arrive(self.arrival.hidden, hidden)

    def _arrive(
        self, blocks: Blocks, receive: Receive, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.arrival.hidden is not None:
            raise ModelError(
                f"the step calls the blocks of stage {self.stage} a second time (model.generate does, for each token), and a "
                "pipeline stage runs its blocks once for each microbatch: use a layout without pp for such a step"
            )
        held = blocks.find(self.cut.arriving, self.seen, args, kwargs)
        received, returns = receive([self.program.carry.like(hidden), *held]), self.cut.arriving_returns
        self.arrival.put(received, held, returns if self.needs_grad else [False] * len(returns))


def _cut(plan: Plan, stage: int) -> Cut:
    bounds, last = plan.stages[stage], len(plan.stages) - 1
    arriving = plan.boundaries[stage - 1] if stage > 0 else ()
    leaving = plan.boundaries[stage] if stage < last else ()
    is_bare = stage > 0 and plan.chain is not None and plan.chain.has_gradients[bounds.first - 1]
    return Cut(stage, bounds.first, bounds.last, arriving, leaving, _returned(arriving), _returned(leaving), is_bare)


def _returned(carried: Sequence[CarriedPlan]) -> tuple[bool, ...]:
    return (True, *(each.has_gradient for each in carried))
