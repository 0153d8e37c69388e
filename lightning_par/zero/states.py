"""The contract between the training loop and whoever owns gradients' reduction, optimizer states and the step.

One optimizer step, on every rank, in this order::

    with states.accumulate():              once per training_step, several times with accumulate_grad_batches
        ... of each microbatch: forward, states.after_forward(), backward, states.after_backward()
    sum_shared_gradients(...)              gradients.py: tied stages, partial gradients
    states.reduce()                        mean over dp
    global_norm, clip_by_norm              gradients.py: on states.gradients(), in place
    states.step(); states.zero_grad()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_par.errors import CheckpointError
from lightning_par.zero.held import Held, Source
from lightning_par.zero.twin import hyperparameters


class Fragment(NamedTuple):
    """A piece of the gradient of one parameter.

    Attributes:
        gradient: live, of any shape; padding at its end is zero.
        parameter: whose.
        start: where the piece begins in the parameter's local gradient, read flat.
        is_counted: whether this rank counts it over dp: a replicated gradient counts on dp coordinate 0, a partitioned one on
            the rank that holds it.
    """

    gradient: Tensor
    parameter: nn.Parameter
    start: int
    is_counted: bool


class Stored(NamedTuple):
    """The tensors of the model states on this rank, live; one may be in two lists, or a view of another.

    Attributes:
        parameters: in ZeRO-3 the rank's parts.
        gradients: as they are now.
        states: of the optimizer, master weights included.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    states: list[Tensor]


class OptimizerStates(ABC):
    """Reduces gradients over dp and steps the optimizers of one module.

    The user's optimizers keep their ``param_groups``, empty ones included, in the user's order: learning-rate schedulers
    and monitors change and read those, and every step obeys them. The verbs take the one optimizer that is meant;
    ``None`` means all.

    Attributes:
        module: the module whose parameters this rank holds.
        optimizers: the user's optimizers.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.module, self.optimizers = module, tuple(optimizers)

    @property
    def sent_bytes(self) -> float:
        """What this rank has sent over dp in collectives that are not those of the axis, by the ring."""
        return 0.0

    @abstractmethod
    def accumulate(self) -> AbstractContextManager[None]:
        """Around the microbatches of one training step; gradients add up in ``p.grad``.

        May be entered several times before `reduce`. Leaving it, by an exception too, runs no collective.
        """

    @abstractmethod
    def evaluate(self) -> AbstractContextManager[None]:
        """Around the forwards of one validation, test or predict step, without gradients (``no_grad``).

        ``inference_mode`` is no option where parameters are partitioned: what it gathers cannot be trained on.
        """

    @abstractmethod
    def after_forward(self) -> None:
        """After each microbatch's forward, before its backward: settle what an exception through it left open.

        May be a collective over dp: every dp rank calls it at the same place.
        """

    @abstractmethod
    def after_backward(self) -> None:
        """After each microbatch's backward. Every dp rank calls it at the same place: it may be a collective over dp."""

    @abstractmethod
    def reduce(self, optimizer: Optimizer | None = None) -> None:
        """Average gradients over dp; then `gradients` is valid. Collective over dp."""

    @abstractmethod
    def gradients(self, optimizer: Optimizer | None = None) -> Iterator[Fragment]:
        """This rank's gradient fragments, to be read or changed in place between `reduce` and `step`."""

    @abstractmethod
    def step(self, optimizer: Optimizer | None = None) -> None:
        """Step with the reduced gradients. Collective over dp where states are sharded."""

    @abstractmethod
    def zero_grad(self, optimizer: Optimizer | None = None) -> None:
        """Forget all gradients."""

    @abstractmethod
    def stored(self) -> Stored:
        """What takes memory on this rank. No collective."""

    @abstractmethod
    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's name and local value, whole over dp (still one tp shard), in the module's order.

        Collective over dp: every dp rank iterates to the end. A value is valid until the next one is asked for.
        """

    @abstractmethod
    def weights(self) -> Iterator[Held]:
        """This rank's piece of every parameter as forwards read it, live; in the module's order. No collective."""

    @abstractmethod
    def held(self) -> Iterator[Held]:
        """All weights and optimizer states of this rank that have a number for each element, live; in the same order every time.

        A piece is valid until the next one is asked for. No collective.
        """

    @abstractmethod
    def numbers(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        """What the optimizers keep for parameters as a whole, such as step counts. No collective."""

    def groups(self) -> list[list[dict[str, Any]]]:
        """Hyperparameters of the groups of each optimizer, as they are now."""
        return [[hyperparameters(group) for group in optimizer.param_groups] for optimizer in self.optimizers]

    @abstractmethod
    def refill(self, source: Source) -> None:
        """Overwrite all that `held` and `numbers` give; states that the source does not have are forgotten.

        Collective over dp where parameters are sharded.

        Raises:
            CheckpointError: the source lacks a weight, or has what these states cannot be.
        """

    def refill_groups(self, groups: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Take over what `groups` gave.

        Raises:
            CheckpointError: there are more or fewer optimizers or groups here.
        """
        here, there = [len(o.param_groups) for o in self.optimizers], [len(each) for each in groups]
        if here != there:
            raise CheckpointError(
                f"the checkpoint has optimizers with {there} parameter groups, and configure_optimizers gives {here}: resume with "
                "the optimizers that it was trained with"
            )
        for optimizer, saved in zip(self.optimizers, groups, strict=True):
            for group, options in zip(optimizer.param_groups, saved, strict=True):
                group.update(options)

    @abstractmethod
    def close(self) -> None:
        """Free everything. No collective, so safe after an exception. In ZeRO-3 the parameters are lost."""

    @abstractmethod
    def dissolve(self) -> None:
        """`close`, but leave whole, plain parameters, for another run with the same module. Collective over dp."""
