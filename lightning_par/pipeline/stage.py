"""The user's step as the program of a pipeline stage.

Every stage calls the user's own step once for each microbatch. What comes before the blocks runs on every stage; on a
stage that is not the first, its parameters are placeholders and its hidden state is replaced, at the call of the
stage's first block, by the one received. The call of the first block of the next stage ends the step.

[Note: the call of a block] Blocks of other stages stay the user's own objects, with all attributes that models read off
them; only calling them is different. It is changed on their class, not by a hook: activation checkpointing may wrap the
forward inside a module's call or the call itself, and runs it again in the backward. A block's call then gives the same
hidden state as it did in the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from lightning_par.plan.output import OutputPlan
from lightning_par.runtime.call import change_call

Receive = Callable[[torch.Tensor], torch.Tensor]
Where = int | str


class StageExit(BaseException):
    """Carries the hidden state out of the user's step; not an Exception, so that no handler of the user's stops it."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


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


class Stage:
    """The blocks ``first`` up to ``last`` of a chain, cut out of a module in place; see [Note: the call of a block].

    Args:
        blocks: all blocks; none for a module that is one stage.
        first, last: the stage's blocks, ``last`` excluded.
        carry_argument: where each block takes its hidden state.
        outputs: what stands for the output of a block that is passed over.
        carry: the form of the hidden state between the blocks; None for the plain whole tensor.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        first: int,
        last: int,
        carry_argument: tuple[Where, ...],
        outputs: tuple[OutputPlan, ...],
        carry: Carry | None = None,
    ) -> None:
        self._receive: Receive | None = None
        self._carry = carry
        for index, block in enumerate(blocks):
            if index < first:
                change_call(block, _passing(carry_argument[index], outputs[index]))
            elif index >= last:
                change_call(block, self._leaving(carry_argument[index]))
            elif index == first and (first > 0 or carry is not None):
                change_call(block, self._entering(type(block), carry_argument[index], first == 0))

    def run(self, program: Callable[[], Any], receive: Receive | None) -> tuple[Any, torch.Tensor | None]:
        """Run the step once.

        Args:
            program: calls the user's step.
            receive: gives the hidden state of the stage before, for a tensor of its shape and dtype; None on the first stage.

        Returns:
            What the step returned and None on the last stage; None and the hidden state to send on the others.
        """
        with self.receiving(receive):
            try:
                return program(), None
            except StageExit as leaving:
                return None, leaving.hidden

    @contextmanager
    def receiving(self, receive: Receive | None) -> Iterator[None]:
        """Inside, the stage's first block starts from what ``receive`` gives; also where a backward runs it again."""
        self._receive = receive
        try:
            yield
        finally:
            self._receive = None

    def _entering(self, cls: type[nn.Module], where: Where, is_first: bool) -> Callable[..., Any]:
        """The call of the stage's first block: with the hidden state that was received, in the form that blocks want."""

        def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            hidden = _pick(where, args, kwargs)
            hidden = self._arrive(hidden) if not is_first else self._carry.enter(hidden) if self._carry else hidden
            if isinstance(where, int):
                args = (*args[:where], hidden, *args[where + 1 :])
            else:
                kwargs = {**kwargs, where: hidden}
            return cls.__call__(block, *args, **kwargs)

        return call

    def _arrive(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self._receive is not None, "a block of a later stage was called outside a step"
        if self._carry is None:
            return self._receive(hidden)
        return self._carry.arrive(self._receive(self._carry.like(hidden)), hidden)

    def _leaving(self, where: Where) -> Callable[..., Any]:
        """The call of a block of a later stage: ends the step on this one."""

        def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            hidden = _pick(where, args, kwargs)
            raise StageExit(self._carry.leave(hidden) if self._carry else hidden)

        return call


def _passing(where: Where, output: OutputPlan) -> Callable[..., Any]:
    """The call of a block of an earlier stage: gives its input back in the form of the block's output."""

    def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = _pick(where, args, kwargs)
        return output.build(hidden, output.placeholders(hidden, args, kwargs))

    return call


def _pick(where: Where, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = args[where] if isinstance(where, int) else kwargs[where]
    return hidden
