"""A training DataLoader that goes on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from lightning_par.host.data.reading import Reading
from lightning_par.host.data.twin import twin_of
from lightning_par.private.loader import Ordered


class ResumableLoader(Ordered):
    """What `make_resumable` adds to a DataLoader. Lightning finds the two methods by their names and asks for its state by them."""

    __slots__ = ("reading",)
    reading: Reading

    def __iter__(self) -> Iterator[Any]:
        return self.reading.open(super().__iter__)  # type: ignore[misc]

    def order(self, indices: Any) -> Any:
        return _Order(indices, self.reading)

    def state_dict(self) -> dict[str, Any]:
        """Where training is in this loader's data, by the Trainer's count of the batches that it has used; plain data."""
        return self.reading.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next iterator begin where `state_dict` was called."""
        self.reading.load_state_dict(state)


def make_resumable(loader: DataLoader[Any], reading: Reading) -> DataLoader[Any]:
    """A loader that can be resumed; the user's own stays what it is."""
    twin: Any = twin_of(loader, ResumableLoader)
    twin.reading = reading
    return twin


class _Order:
    """A loader's indices, of which its reading sees the first drawn."""

    def __init__(self, indices: Any, reading: Reading) -> None:
        self._indices, self._reading = indices, reading

    def __iter__(self) -> Iterator[Any]:
        return self._reading.draw(iter(self._indices))

    def __len__(self) -> int:
        return len(self._indices)
