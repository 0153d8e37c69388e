"""The arguments of a block as they were when it was first called.

Tensors among them go through autograd, which notices when one was changed in place. Objects that the block may change,
such as the cache of keys and values that transformers gives to every block of a training step, are copied: computed again
on the changed ones, a block would see its own keys twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lightning_par.runtime.nested import tensors_in
from lightning_par.tensor import ShardedTensor

_UNCHANGING = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.dtype, torch.device, torch.Size)


class Arguments:
    """One call's arguments, for its first run and for later ones.

    Args:
        args, kwargs: as the block was called.
        can_watch: whether what the first run reads can be found out; else all is kept.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], can_watch: bool = True) -> None:
        self._num_args, self._can_watch = len(args), can_watch
        self._given: dict[int | str, Any] = dict(enumerate(args))
        self._given.update(kwargs.items())
        tensors = {place: value for place, value in self._given.items() if isinstance(value, torch.Tensor)}
        self._tensors = [_inner(tensor) for tensor in tensors.values()]
        self._forms = {place: _form(tensor) for place, tensor in tensors.items()}
        self._kept = {place: value for place, value in self._given.items() if place not in tensors}
        self._changing = {place: value for place, value in self._kept.items() if not _is_unchanging(value)}

    def take_tensors(self) -> list[torch.Tensor]:
        """The tensors among them, of sharded ones the local part, for `torch.utils.checkpoint.checkpoint` to hold; once.

        It saves them as autograd saves others, so that they can wait elsewhere; they must be held by nothing else.
        """
        taken, self._tensors = self._tensors, []
        return taken

    @contextmanager
    def first_use(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments themselves, for the first run; what it does not read of changing objects is not kept after it."""
        given, self._given = self._given, {}
        if not self._changing:
            yield self._split(given)
            return
        entered = _copies(self._changing, lambda tensor: tensor)
        self._changing = {}
        if self._can_watch:
            with _Reads() as reads:
                yield self._split(given)
            self._changing = _copies(entered, lambda tensor: tensor if id(tensor) in reads.seen else tensor.to("meta"))
        else:  # a compiler would trace the watching too
            yield self._split(given)
            self._changing = entered
        self._kept.update(self._changing)

    def again(self, tensors: tuple[torch.Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same for a later run, with ``tensors`` in the places of those that were taken."""
        formed = {place: form(tensor) for (place, form), tensor in zip(self._forms.items(), tensors, strict=True)}
        return self._split({**self._kept, **_copies(self._changing, lambda tensor: tensor), **formed})

    def _split(self, given: dict[int | str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {place: value for place, value in given.items() if isinstance(place, str)}
        return tuple(given[place] for place in range(self._num_args)), named


class _Reads(TorchFunctionMode):
    """Notes which tensors the functions of torch are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, torch.Tensor] = {}  # by id, alive so that no id is used twice

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        for tensor in tensors_in((args, kwargs or {})):
            self.seen[id(_inner(tensor))] = _inner(tensor)
        return func(*args, **(kwargs or {}))


class _Replacing(TorchFunctionMode):
    """While a structure is deep-copied: each tensor in it becomes ``replace(tensor)``."""

    def __init__(self, replace: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._replace = replace

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return self._replace(args[0])
        return func(*args, **(kwargs or {}))


def _copies(values: dict[Any, Any], replace: Callable[[torch.Tensor], torch.Tensor]) -> dict[Any, Any]:
    """Deep copies, each tensor in them replaced; what cannot be copied stays itself."""
    memo: dict[int, Any] = {}
    with _Replacing(replace):
        return {place: _copied(value, memo) for place, value in values.items()}


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # an open file, a lock: shared, as by any checkpointing
        return value


def _inner(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.local if isinstance(tensor, ShardedTensor) else tensor


def _form(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes an argument of ``_inner(tensor)``; does not hold the tensor."""
    if not isinstance(tensor, ShardedTensor):
        return lambda inner: inner
    dim, segments, axis = tensor.shard_dim, tensor.segments, tensor.axis
    return lambda inner: ShardedTensor(inner, dim, segments, axis)


def _is_unchanging(value: Any) -> bool:
    return all(_is_unchanging(item) for item in value) if type(value) is tuple else isinstance(value, _UNCHANGING)
