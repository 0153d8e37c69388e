"""An axis that sends nothing and stores what collectives over a process group store, to see what a run is going to store."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_par.runtime.axis import LocalAxis, Wait

# told what a collective writes and what it reads; what it returns is called when the result is waited for
Watcher = Callable[[torch.Tensor, torch.Tensor], Wait | None]


class ImaginedAxis(LocalAxis):
    """A `LocalAxis` whose results lie in memory as those of a `GroupAxis`. Values mean nothing.

    Attributes:
        watchers: told of each collective, which nothing below autograd can see.
    """

    def __init__(self, name: str, size: int, coordinate: int) -> None:
        super().__init__(name, size, coordinate)
        self.watchers: list[Watcher] = []

    def begin_all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> Wait:
        return self._tell(tensor, tensor)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        gathered = tensor.new_empty((self.size * tensor.numel(),))
        self._tell(gathered, tensor)()
        return list(gathered.view(self.size, *tensor.shape).unbind(0))

    def begin_reduce_scatter(self, parts: torch.Tensor) -> tuple[torch.Tensor, Wait]:
        mine = parts.new_empty(parts.shape[1:])
        return mine, self._tell(mine, parts)

    def _tell(self, written: torch.Tensor, read: torch.Tensor) -> Wait:
        told = [watcher(written, read) for watcher in self.watchers]

        def wait() -> None:
            for each in told:
                if each is not None:
                    each()

        return wait
