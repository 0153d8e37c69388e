"""The first batches of a run, looked at without disturbing the order of the data."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_par.errors import DataError
from lightning_par.host.data.parts import datasets_of
from lightning_par.runtime.generator import generators_put_back
from lightning_par.runtime.generator_state import find_generators, restore, states_of


def first_batch(loaders: Any) -> Any:
    """The first batch of a loader, or of every loader in a dict or list, as the step gets it.

    A DataLoader's dataset is read in this process, without workers, in the order of a copy of its sampler.

    Raises:
        DataError: the data is an iterator that can be read only once, or is empty.
    """
    return first_batches(loaders, 1)[0]


def first_batches(loaders: Any, count: int) -> list[Any]:
    """As many batches from the start, as `first_batch` gives one; at least one, and fewer where there are no more.

    Raises:
        DataError: as there.
    """
    found: list[Any]
    if isinstance(loaders, Mapping):
        columns = zip(*(first_batches(loader, count) for loader in loaders.values()), strict=False)
        found = [dict(zip(loaders, column, strict=True)) for column in columns]
    elif isinstance(loaders, (list, tuple)):
        rows = zip(*(first_batches(loader, count) for loader in loaders), strict=False)
        found = [type(loaders)(row) for row in rows]
    else:
        found = _first_of(loaders, count)
    if not found:
        raise DataError(f"the {type(loaders).__name__} gives no batch: a run needs at least one")
    return found


def _first_of(loader: Any, count: int) -> list[Any]:
    """The first batches of one loader; all generators are afterwards as before."""
    own = find_generators(datasets_of(loader.dataset)) if isinstance(loader, DataLoader) else {}
    states = states_of(own)
    with generators_put_back():
        batches = _batches(loader) if isinstance(loader, DataLoader) else _iterate(loader, "train_dataloaders")
        found = list(itertools.islice(batches, count))
        restore(own, states)
    return found


def _batches(loader: DataLoader[Any]) -> Iterator[Any]:
    collate, dataset = loader.collate_fn, loader.dataset
    if isinstance(dataset, IterableDataset):
        items = _iterate(dataset, "the loader's IterableDataset")
        if loader.batch_size is None:
            yield from map(collate, items)
        while batch := list(itertools.islice(items, loader.batch_size)):
            yield collate(batch)
    elif loader.batch_sampler is not None:
        for indices in _copied(loader.batch_sampler, dataset):
            yield collate([dataset[index] for index in indices])
    else:
        for index in _copied(loader.sampler, dataset):
            yield collate(dataset[index])


def _iterate(data: Iterable[Any], what: str) -> Iterator[Any]:
    if not isinstance(data, Iterator):
        return iter(data)
    try:
        return iter(copy.deepcopy(data))
    except Exception as error:
        raise DataError(
            f"{what} is a {type(data).__name__}, which can be read only once: the plan is made from the first batch, and every "
            "epoch reads from the start. Give a DataLoader, or an object whose __iter__ starts afresh"
        ) from error


def _copied(sampler: Any, dataset: Any) -> Any:
    """A sampler with generators of its own, over the same data."""
    try:
        return copy.deepcopy(sampler, {id(dataset): dataset})
    except Exception:  # holds what cannot be copied
        return sampler
