"""The one private name of torch's DataLoader that this package relies on. Read in torch 2.13."""

from __future__ import annotations

from typing import Any


class Ordered:
    """A mixin for a DataLoader that sees what its iterators draw: indices of samples or of batches, in their order.

    A loader's iterator keeps ``_index_sampler`` when it is made, and iterates over it once when it is made and, with workers,
    again before each epoch (torch/utils/data/dataloader.py). `sampler` and `batch_sampler` stay the user's own.
    """

    def order(self, indices: Any) -> Any:
        """What the iterators draw from in the place of ``indices``."""
        raise NotImplementedError

    @property
    def _index_sampler(self) -> Any:
        return self.order(super()._index_sampler)  # type: ignore[misc]
