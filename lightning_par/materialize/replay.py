"""A record run again on real tensors: whole tensors, by any operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_par.materialize.record import Draw, Operation, Place, Record, map_places, places_in
from lightning_par.materialize.stream import GROUP, in_cells, skip, words_for
from lightning_par.materialize.truncation import Passes, cuts_nothing, find_passes, is_known
from lightning_par.runtime.generator import generators_put_back
from lightning_par.runtime.random import mix_seed

FILLS = ("normal_", "uniform_", "trunc_normal_")  # draw each element for itself, from numbers as arguments


def replay(record: Record, place: Place, before: int | None = None) -> torch.Tensor:
    """The values of a tensor at the end of a record, or before one of its operations.

    Memory: what is needed of all storages that its values come from, the largest number of them that is live at once.
    """
    operations = record.needed([place.key], before)
    with generators_put_back(), torch.no_grad():
        storages = _run(record, operations, keep={place.key})
        return place.within(_storage(storages, record, place.key)).clone()


def state_before(record: Record, draw: Draw) -> torch.Tensor:
    """The state in which one process draws (`exact`): numbers drawn since the last known state are passed over all at once."""
    chain, at = [], draw
    while at not in record.cache and isinstance(at.previous, Draw):
        chain.append(at)
        at = at.previous
    if at not in record.cache:
        assert not isinstance(at.previous, Draw)
        record.cache[at] = record.start if at.previous is None else at.previous
    state, words = record.cache[at], 0
    for later in reversed(chain):
        assert isinstance(later.previous, Draw)
        taken = _words_of(record, later.previous)
        if taken is None:
            record.cache[later.previous] = skip(state, words)
            state, words = _state_after_running(record, later.previous), 0
            record.cache[later] = state
        else:
            words += taken
    record.cache[draw] = skip(state, words)
    return record.cache[draw]


def state_after(record: Record, draw: Draw) -> torch.Tensor:
    """The state in which one process goes on after a draw."""
    words = _words_of(record, draw)
    return _state_after_running(record, draw) if words is None else skip(state_before(record, draw), words)


def _words_of(record: Record, draw: Draw) -> int | None:
    """Numbers of 32 bits that a draw takes; None where it has to be run to know."""
    operation = record.operations[draw.index]
    (name, args), place = call_of(operation), operation.target
    return words_for(name, args, place.dtype, place.numel) if name in ("normal_", "uniform_") and place.is_contiguous else None


def _state_after_running(record: Record, draw: Draw) -> torch.Tensor:
    operation = record.operations[draw.index]
    if is_truncation(operation):
        return passes_of(record, operation).end
    with generators_put_back(), torch.no_grad():
        storages = _run(record, record.needed(operation.reads, operation.index), keep=set(operation.reads))
        _call(record, operation, storages)
        return draw.generator.get_state()


def passes_of(record: Record, operation: Operation) -> Passes:
    """How often torch draws the tensor of a truncated draw."""
    draw, target = operation.draw, operation.target
    assert draw is not None
    if draw not in record.passes:
        state, args = state_before(record, draw), operation.args[1:]
        with generators_put_back(), torch.no_grad():
            record.passes[draw] = find_passes(state, args, target.dtype, target.numel, draw.generator)
    passes: Passes = record.passes[draw]
    return passes


def is_truncation(operation: Operation) -> bool:
    """Whether it is a truncated draw, in passes, of which parts can be made alone."""
    return _has_passes(operation) and not cuts_nothing(operation.args[1:])


def _has_passes(operation: Operation) -> bool:
    target, args = operation.target, operation.args[1:]
    is_plain = operation.name == "trunc_normal_" and target.is_contiguous and target.numel >= GROUP
    return is_plain and is_known(args, target.dtype)


def call_of(operation: Operation) -> tuple[str, tuple[Any, ...]]:
    """The name and the numbers of the fill that an operation amounts to."""
    name, args = operation.name, operation.args[1:]
    if name in ("randn", "rand"):
        return ("normal_", (0.0, 1.0)) if name == "randn" else ("uniform_", (0.0, 1.0))
    return ("normal_", args[:2]) if _has_passes(operation) and cuts_nothing(args) else (name, args)


def seed_of(record: Record, operation: Operation, cell: int) -> int:
    """The seed of a part of a draw (`fast`)."""
    return mix_seed(mix_seed(record.seed, operation.index), cell)


@contextmanager
def drawing(record: Record, operation: Operation) -> Iterator[None]:
    """Inside, the operation's generator is where the record says. Leaves it anywhere."""
    if operation.draw is not None:
        if record.init == "exact":
            operation.draw.generator.set_state(state_before(record, operation.draw))
        else:
            operation.draw.generator.manual_seed(seed_of(record, operation, 0))
    yield


def _run(record: Record, operations: list[Operation], keep: set[int]) -> dict[int, torch.UntypedStorage]:
    """Run operations; storages of others than ``keep`` are freed after their last use."""
    storages: dict[int, torch.UntypedStorage] = {}
    last = {key: operation.index for operation in operations for key in operation.reads | operation.writes}
    for operation in operations:
        _call(record, operation, storages)
        for key in [key for key in storages if last[key] == operation.index and key not in keep]:
            del storages[key]
    return storages


def _call(record: Record, operation: Operation, storages: dict[int, torch.UntypedStorage]) -> None:
    with drawing(record, operation):
        if record.init == "fast" and _is_fill(operation):
            out = operation.target.within(_storage(storages, record, operation.target.key)).view(-1)
            fill_fast(record, operation, out, 0)
            return
        args = map_places(lambda place: place.within(_storage(storages, record, place.key)), operation.args)
        kwargs = map_places(lambda place: place.within(_storage(storages, record, place.key)), operation.kwargs)
        result = operation.function(*args, **kwargs)
    results = [each for each in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(each, torch.Tensor)]
    for place, tensor in zip(operation.outputs, results, strict=True):
        if place.key in operation.writes and place.key not in storages:
            assert tuple(tensor.stride()) == place.stride or tensor.numel() <= 1, f"{operation.name} gave other strides"
            storages[place.key] = tensor.untyped_storage()


def _is_fill(operation: Operation) -> bool:
    """Whether it fills contiguous memory with numbers drawn one by one."""
    named = operation.name in (*FILLS, "randn", "rand") and not places_in(operation.args[1:])
    return named and operation.target.is_contiguous


def fill_fast(record: Record, operation: Operation, out: torch.Tensor, first: int) -> None:
    """Elements ``first`` and following of what a fill draws, by a seed for each cell."""
    name, args = call_of(operation)
    function = torch.nn.init.trunc_normal_ if name == "trunc_normal_" else getattr(torch.Tensor, name)
    in_cells(out, first, operation.target.numel, lambda cell: seed_of(record, operation, cell), lambda part: function(part, *args))


def _storage(storages: dict[int, torch.UntypedStorage], record: Record, key: int) -> torch.UntypedStorage:
    if key not in storages:
        storages[key] = torch.UntypedStorage(record.storages[key].nbytes())
    return storages[key]
