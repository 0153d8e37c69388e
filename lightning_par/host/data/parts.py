"""What a loader is made of: its samplers and datasets, and those inside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler


def samplers_of(loader: DataLoader[Any]) -> list[Any]:
    """Whatever makes a loader's order."""
    return _all_inside([loader.sampler, loader.batch_sampler], but=loader.dataset)


def datasets_of(dataset: Any) -> list[Any]:
    """A dataset and those that it reads."""
    return _all_inside([dataset], but=None)


def is_stateful(part: Any) -> bool:
    """Whether it has a state that can be saved, in the way that Lightning asks a loader (fabric/utilities/types.py)."""
    return callable(getattr(part, "state_dict", None)) and callable(getattr(part, "load_state_dict", None))


def _all_inside(waiting: list[Any], but: Any) -> list[Any]:
    found: list[Any] = []
    while waiting:
        each = waiting.pop(0)
        if each is not None and each is not but and not any(each is known for known in found):
            found.append(each)
            waiting += _inside(each)
    return found


def _inside(part: Any) -> Iterator[Any]:
    for value in getattr(part, "__dict__", {}).values():
        for each in value if isinstance(value, (list, tuple)) and len(value) < 1000 else [value]:  # not a list of samples
            if isinstance(each, (Sampler, Dataset)):
                yield each
