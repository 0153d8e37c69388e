"""The user's step as the program of a pipeline stage.

Every stage calls the user's own step once for each microbatch. What comes before the blocks runs on every stage; on a
stage that is not the first, its parameters are placeholders and its hidden state is replaced, at the call of the
stage's first block, by the one received. The call of the first block of the next stage ends the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Receive = Callable[[torch.Tensor], torch.Tensor]


class StageExit(BaseException):
    """Carries the hidden state out of the user's step; not an Exception, so that no handler of the user's stops it."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Stage:
    """The blocks ``first`` up to ``last`` of a chain, cut out of a module in place.

    Args:
        chain: the container of the blocks.
        first, last: the stage's blocks, ``last`` excluded.
        carry_argument: where each block takes its hidden state.
        carry_output, output_keys: where each block's output has it.
    """

    def __init__(
        self,
        chain: nn.Module | None,
        first: int,
        last: int,
        carry_argument: tuple[int | str, ...],
        carry_output: tuple[tuple[int | str, ...], ...],
        output_keys: tuple[tuple[int | str, ...], ...],
    ) -> None:
        self._receive: Receive | None = None
        if chain is None:
            return
        names = list(chain._modules)
        for index, name in enumerate(names):
            block = chain._modules[name]
            assert block is not None
            if index < first:
                chain._modules[name] = PassBlock(block, carry_argument[index], carry_output[index], output_keys[index])
            elif index >= last:
                chain._modules[name] = ExitBlock(block, carry_argument[index])
        if first > 0:
            entrance = chain._modules[names[first]]
            assert entrance is not None
            entrance.register_forward_pre_hook(self._deliver(carry_argument[first]), with_kwargs=True, prepend=True)

    def run(self, program: Callable[[], Any], receive: Receive | None) -> tuple[Any, torch.Tensor | None]:
        """Run the step once.

        Args:
            program: calls the user's step.
            receive: gives the hidden state of the stage before, for a tensor of its shape and dtype; None on the first stage.

        Returns:
            What the step returned and None on the last stage; None and the hidden state to send on the others.
        """
        self._receive = receive
        try:
            return program(), None
        except StageExit as leaving:
            return None, leaving.hidden
        finally:
            self._receive = None

    def _deliver(self, where: int | str) -> Callable[..., Any]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            assert self._receive is not None, "a block of a later stage was called outside a step"
            hidden = self._receive(_pick(where, args, kwargs))
            if isinstance(where, int):
                return (*args[:where], hidden, *args[where + 1 :]), kwargs
            return args, {**kwargs, where: hidden}

        return hook


class _Stand(nn.Module):
    """Stands for a block of another stage: no parameters, the plain attributes that models read off their blocks."""

    def __init__(self, block: nn.Module, carry_argument: int | str) -> None:
        super().__init__()
        self.carry_argument = carry_argument
        self.training = block.training
        self.__dict__["attributes"] = {
            name: value for name, value in block.__dict__.items() if not name.startswith("_") and not isinstance(value, torch.Tensor)
        }

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__.get("attributes", {})
        return attributes[name] if name in attributes else super().__getattr__(name)


class PassBlock(_Stand):
    """A block of an earlier stage: gives its input back in the form of the block's output."""

    def __init__(
        self, block: nn.Module, carry_argument: int | str, carry_output: tuple[int | str, ...], output_keys: tuple[int | str, ...]
    ) -> None:
        super().__init__(block, carry_argument)
        self.carry_output, self.output_keys = carry_output, output_keys

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _pick(self.carry_argument, args, kwargs)
        if not self.carry_output:
            return hidden
        entries = {key: hidden if key == self.carry_output[0] else None for key in self.output_keys}
        return entries if any(isinstance(key, str) for key in entries) else tuple(entries.values())


class ExitBlock(_Stand):
    """A block of a later stage: calling it ends the step on this one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise StageExit(_pick(self.carry_argument, args, kwargs))


def _pick(where: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = args[where] if isinstance(where, int) else kwargs[where]
    return hidden
