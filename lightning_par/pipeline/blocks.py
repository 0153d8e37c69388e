"""The blocks of a chain on a rank that holds some of them.

[Note: the call of a block] Blocks of other stages stay the user's own objects, with all attributes that models read off
them; only calling them is different. It is changed on their class, not by a hook: activation checkpointing may wrap the
forward inside a module's call or the call itself, and runs it again in the backward. What a call does then is for whoever runs
the step to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from lightning_par.errors import ModelError
from lightning_par.plan.plan import CarriedPlan, ChainPlan
from lightning_par.runtime.call import change_call
from lightning_par.runtime.template import arguments_of, leaf_at

Seen: TypeAlias = dict[CarriedPlan, torch.Tensor]  # what modules returned, that crosses stages


class Runner(Protocol):
    """Who runs a step.

    Attributes:
        num_passed: so many blocks at the beginning are passed over, with nothing else to do.
    """

    num_passed: int

    def call_block(self, index: int, through: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What calling a block does; ``through`` calls the user's own."""

    def see(self, module: str, output: Any) -> None:
        """A module that was watched has returned."""


class Blocks:
    """Calls of blocks, each handed to the runner of the moment, in place; see [Note: the call of a block].

    Args:
        module: the user's module.
        chain: its chain of blocks.
        crosses: whether anything crosses stages beside the hidden state.
        changed: the blocks, by index, whose calls are not always the user's own.
        watched: modules of which a runner wants to see what they return.

    Attributes:
        chain: the same.
        runner: who runs a step now.
    """

    def __init__(self, module: nn.Module, chain: ChainPlan, crosses: bool, changed: Iterable[int], watched: Iterable[str]) -> None:
        self.chain = chain
        self._gives_back = [not crosses and output.is_input for output in chain.outputs]
        self.runner: Runner | None = None
        for index in changed:
            block = module.get_submodule(chain.blocks[index])
            change_call(block, self._call_of(index, type(block)))
        for name in watched:
            module.get_submodule(name).register_forward_hook(self._hook_of(name))

    def hidden(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The hidden state among the arguments of a block's call."""
        where = self.chain.carry_argument[index]
        hidden: torch.Tensor = args[where] if isinstance(where, int) else kwargs[where]
        return hidden

    def call_with(
        self, index: int, hidden: torch.Tensor, through: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a block with another hidden state."""
        where = self.chain.carry_argument[index]
        if isinstance(where, int):
            return through(*args[:where], hidden, *args[where + 1 :], **kwargs)
        return through(*args, **{**kwargs, where: hidden})

    def pass_over(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], requires_grad: bool = False) -> Any:
        """What the call of a block of another rank gives: its input, in the form of its output."""
        hidden, output = self.hidden(index, args, kwargs), self.chain.outputs[index]
        if requires_grad and hidden.is_floating_point():
            hidden = hidden.detach().requires_grad_()
        if self._gives_back[index]:
            return hidden
        return output.build(hidden, output.placeholders(hidden, args, kwargs))

    def find(self, carried: Sequence[CarriedPlan], seen: Seen, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors that cross where a block is called with these arguments."""
        if not carried:
            return []
        arguments = arguments_of(args, kwargs)
        return [seen[each] if each.place == "output" else leaf_at(arguments, each.path) for each in carried]

    def _call_of(self, index: int, cls: type[nn.Module]) -> Callable[..., Any]:
        where = self.chain.carry_argument[index]

        def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            runner = self.runner
            if runner is None:
                name = self.chain.blocks[index]
                raise ModelError(f"{name} was called outside of a step: a pipeline runs its blocks inside steps")
            if index < runner.num_passed and self._gives_back[index]:  # most calls on a late stage: quickly
                return args[where] if isinstance(where, int) else kwargs[where]
            return runner.call_block(index, lambda *args, **kwargs: cls.__call__(block, *args, **kwargs), args, kwargs)

        return call

    def _hook_of(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.runner is not None:
                self.runner.see(name, output)

        return hook


def see_output(seen: Seen, carried: Iterable[CarriedPlan], module: str, output: Any) -> None:
    """Note those of ``carried`` that ``module`` returned."""
    for each in carried:
        if each.place == "output" and each.module == module:
            seen[each] = leaf_at(output, each.path)
