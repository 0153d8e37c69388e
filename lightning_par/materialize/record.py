"""The record of an initialisation: every operation that makes or fills a tensor, as data from which it can be run again.

Tensors stand in it as places in a storage, so that views need no operations of their own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lightning_par.private.torch import storage_key
from lightning_par.runtime.nested import tensors_in

Init = Literal["exact", "fast"]
_ATTRIBUTE = "lightning_par_record"


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: a storage by its key, and what is seen of it. Offset and strides count elements."""

    key: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Place:
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        return cls(storage_key(tensor), int(tensor.storage_offset()), shape, stride, tensor.dtype)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, in the order of the dims."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def within(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The tensor at this place of a storage with memory."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)


@dataclass(frozen=True, eq=False)
class Draw:
    """That an operation draws random numbers.

    Attributes:
        generator: from which; for one of the user's own a stand-in, which a replay may move.
        previous: the draw before it from the same generator; the state that the generator was in, where it was set anew; None
            for the state at the beginning of the record.
    """

    generator: torch.Generator
    previous: Draw | torch.Tensor | None
    index: int


@dataclass(frozen=True)
class Operation:
    """One operation that makes or changes a tensor.

    Attributes:
        index: its position in the record.
        function: what to call.
        args, kwargs: with; tensors are `Place`s, or real ones whose values are constants.
        outputs: places of the tensors that it returns.
        reads: storages whose values it needs.
        writes: storages that it makes or changes.
        replaces: those of them of which nothing older is left.
        draw: where it draws random numbers.
    """

    index: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Place, ...]
    reads: frozenset[int]
    writes: frozenset[int]
    replaces: frozenset[int]
    draw: Draw | None = None

    @property
    def name(self) -> str:
        """As in ``normal_``."""
        overload = getattr(self.function, "overloadpacket", self.function)
        return str(overload.__name__)

    @property
    def numbers(self) -> list[Any]:
        """Its arguments that are neither constant tensors nor generators."""
        given = [*self.args, *self.kwargs.values()]
        return [value for value in given if not isinstance(value, (torch.Tensor, torch.Generator))]

    @property
    def target(self) -> Place:
        """The first tensor that it makes or changes."""
        return (
            self.args[0] if self.args and isinstance(self.args[0], Place) and self.args[0].key in self.writes else self.outputs[0]
        )


@dataclass(eq=False)
class Record:
    """All operations of a `deferred_init`, in order.

    Attributes:
        init: how random numbers are drawn again: ``exact`` as one process draws them, or ``fast``, from a seed for each
            operation.
        seed: what these seeds come from.
        start: the state of torch's default generator at the beginning.
    """

    init: Init
    seed: int
    start: torch.Tensor
    operations: list[Operation] = field(default_factory=list)
    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    writers: dict[int, list[int]] = field(default_factory=dict)
    cache: dict[Draw, torch.Tensor] = field(default_factory=dict)  # states before draws, found once
    passes: dict[Draw, Any] = field(default_factory=dict)  # those of truncated draws, see `lightning_par.materialize.truncation`

    def hold(self, tensor: torch.Tensor) -> bool:
        """Note a tensor's storage, which stays alive so that its key stays its own; whether it is a new one."""
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key in self.storages:
            return False
        self.storages[key] = storage
        setattr(storage, _ATTRIBUTE, self)
        return True

    def add(self, operation: Operation) -> None:
        self.operations.append(operation)
        for key in operation.writes:
            self.writers.setdefault(key, []).append(operation.index)

    def digest(self) -> str:
        """Equal for records of the same operations with the same numbers; storages and constants apart."""
        lines = (f"{each.name} {map_places(_shape, each.numbers)} {each.target.shape}" for each in self.operations)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def constants(self) -> list[torch.Tensor]:
        """The real tensors among the arguments, in order."""
        return [tensor for operation in self.operations for tensor in tensors_in([operation.args, operation.kwargs])]

    def needed(self, keys: Iterable[int], before: int | None = None) -> list[Operation]:
        """The operations, in order, that give storages the values they have ``before`` an operation, or at the end."""
        end = len(self.operations) if before is None else before
        wanted: set[int] = set()
        waiting, seen = [(key, end) for key in keys], set()
        while waiting:
            key, limit = waiting.pop()
            if (key, limit) in seen:
                continue
            seen.add((key, limit))
            for index in self._written(key, limit):
                operation = self.operations[index]
                wanted.add(index)
                waiting += [(read, index) for read in operation.reads]
                if key in operation.replaces:
                    break
        return [self.operations[index] for index in sorted(wanted)]

    def _written(self, key: int, limit: int) -> Iterator[int]:
        return (index for index in reversed(self.writers.get(key, ())) if index < limit)


def _shape(place: Place) -> str:
    return f"{place.offset} {place.shape} {place.stride}"


def record_of(tensor: torch.Tensor) -> Record | None:
    """The record that knows the values of a tensor on the meta device; None where there is none."""
    return getattr(tensor.untyped_storage(), _ATTRIBUTE, None) if tensor.is_meta else None


def places_in(tree: Any) -> list[Place]:
    """The places among arguments."""
    if isinstance(tree, Place):
        return [tree]
    if isinstance(tree, dict):
        return [place for value in tree.values() for place in places_in(value)]
    return [place for value in tree for place in places_in(value)] if isinstance(tree, (list, tuple)) else []


def map_places(function: Callable[[Place], Any], tree: Any) -> Any:
    """Arguments with every place replaced."""
    if isinstance(tree, Place):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_places(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        mapped: Sequence[Any] = [map_places(function, value) for value in tree]
        return type(tree)(mapped)
    return tree
