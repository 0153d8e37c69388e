"""A started DeepSpeed engine, taken out of its own control flow: what the stages have in common."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_par.private.deepspeed.mark import Marks


class ZeroEngine(ABC):
    """A started DeepSpeed engine without its gradient hooks: gradients pile up in ``p.grad`` until `flush`.

    Attributes:
        NAMES: what DeepSpeed's ZeRO optimizer must have, once started.
    """

    NAMES: tuple[str, ...]

    def __init__(self, engine: Any, marks: Marks) -> None:
        self.engine, self.root, self.zero, self.marks = engine, engine.module, engine.optimizer, marks
        # they reduce at every backward of engine.backward, and lose gradients where backwards follow one another
        for hook in self.zero._grad_acc_hooks:
            hook.remove()
        self.zero._grad_acc_hooks.clear()

    @property
    def inner(self) -> Optimizer:
        """The torch optimizer that steps the masters."""
        inner: Optimizer = self.zero.optimizer
        return inner

    @property
    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The flat weights that this rank steps, by group (stage 3: by sub-group)."""

    @property
    def buffers(self) -> list[Tensor]:
        """What is kept for gradients besides ``p.grad``, from step to step."""
        return []

    def files_to_come(self, states: Iterable[str]) -> dict[str, int]:
        """Bytes of every file that there is going to be, by path.

        Args:
            states: what the optimizer keeps for each element, by name.
        """
        return {}

    def read_state(self, group: int) -> tuple[Tensor, dict[str, Any]]:
        """The masters and the optimizer's states of a group, to be read before the next step."""
        master = self.masters[group]
        return master.detach(), dict(self.inner.state[master])

    def state_replaced(self, group: int) -> AbstractContextManager[Tensor]:
        """While open, gives the masters of a group, to be overwritten; so may be what ``inner.state`` has for them."""
        return nullcontext(self.masters[group])

    @abstractmethod
    def pieces(self, group: int) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        """What the masters of a group are pieces of: parameter, where in it the piece begins, where in the masters, how long."""

    @abstractmethod
    def flush(self) -> None:
        """Average ``p.grad`` over dp into partitions; ``p.grad`` is gone then. Collective over dp."""

    @abstractmethod
    def fragments(self) -> Iterator[tuple[Tensor, nn.Parameter, int]]:
        """The averaged gradient partitions between `flush` and `step`, live, each with its parameter and where in it it begins."""

    @abstractmethod
    def open_early(self) -> None:
        """Before the first `reduce_early` of a step: there is no gradient yet."""

    @abstractmethod
    def reduce_early(self, parameter: nn.Parameter) -> None:
        """During a backward: average ``parameter.grad`` over dp into its partition, at the latest in `close_early`. ``grad`` is
        gone then. Collective over dp: every dp rank calls it for the same parameters in the same order, each at most once
        before `close_early`."""

    @abstractmethod
    def close_early(self, late: Iterable[nn.Parameter]) -> None:
        """Reduce what `reduce_early` was given and has not reduced yet. Collective over dp.

        Args:
            late: the parameters that are left to `flush_late`; their gradients stay.
        """

    @abstractmethod
    def flush_late(self) -> None:
        """`flush` at the end of a step with `reduce_early`: the gradients left in ``p.grad``, added to the others."""

    @abstractmethod
    def publish(self) -> None:
        """Make the parameters what the masters say, after a load. Collective over dp."""

    def step(self) -> None:
        """Step the masters and publish them. Collective over dp."""
        self.zero.step()

    def forget_gradients(self) -> None:
        """Drop ``p.grad``, and what `flush` made of it."""
        self.zero.zero_grad()

    def whole(self, parameter: nn.Parameter) -> AbstractContextManager[None]:
        """While open, ``parameter.data`` is whole over dp. Collective over dp in stage 3."""
        return nullcontext()

    def stored(self, parameter: nn.Parameter) -> Tensor:
        """What this rank stores of a parameter, live."""
        return parameter.detach()

    def stored_piece(self, parameter: nn.Parameter) -> tuple[Tensor, int, bool]:
        """The same, flat and without padding; where in the parameter it begins; whether every dp rank stores it."""
        return parameter.detach().view(-1), 0, True

    @abstractmethod
    def detect_borrowed(self, is_on: bool) -> None:
        """While on, reading a parameter of a module that is not running gathers it (``F.linear(x, wte.weight)``)."""

    def saving(self) -> AbstractContextManager[object]:
        """Inside, what autograd saves of a parameter does not hold the memory of one that is gathered for a while."""
        return nullcontext()

    @abstractmethod
    def settle(self, keep: bool) -> None:
        """After a forward: close what an exception through it left open.

        Args:
            keep: the backward is still to come: keep the parameters of the modules around the cut. May be a collective
                over dp.
        """

    @abstractmethod
    def release_backward(self) -> None:
        """After a backward: release what was gathered for it."""

    def destroy(self) -> None:
        """Remove every hook and mark, and what DeepSpeed keeps process-wide. No collective.

        Stage 3 leaves the parameters empty.
        """
        self.engine.destroy()
        self.marks.remove()
        groups: Any = importlib.import_module("deepspeed.utils.groups")
        groups.mpu = None
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        del self.engine, self.zero, self.root, self.marks
