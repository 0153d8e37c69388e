"""What DeepSpeed sends in a run: its collectives, seen where all of them pass, in `deepspeed.comm` (read in 0.19.8)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Cost = Callable[[str, int, int], float]

_KINDS = {
    "all_reduce": "all_reduce",
    "reduce": "reduce",
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "reduce_scatter",  # sends as much: all but its own part
}


class Traffic:
    """Sees every collective of DeepSpeed, until `close`. An engine has started; of several, the last one's sees all.

    Args:
        cost: the bytes that a rank sends in a collective of a kind, by the bytes of the whole tensor and the number of ranks.

    Attributes:
        sent_bytes: what this rank has sent. The root of a reduction sends nothing.
    """

    def __init__(self, cost: Cost) -> None:
        self.sent_bytes = 0.0
        self._cost = cost
        self._backend: Any = importlib.import_module("deepspeed.comm.comm").cdb
        for name in _KINDS:
            vars(self._backend).pop(name, None)
            setattr(self._backend, name, self._watched(name, getattr(self._backend, name)))

    def close(self) -> None:
        """Leave DeepSpeed as it was."""
        for name in _KINDS:
            vars(self._backend).pop(name, None)

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if name != "reduce" or kwargs["dst"] != self._backend.get_rank():
                whole = max(_num_bytes(value) for value in (*args, *kwargs.values()))
                self.sent_bytes += self._cost(_KINDS[name], whole, self._backend.get_world_size(kwargs.get("group")))
            return call(*args, **kwargs)

        return watched


def _num_bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_num_bytes, value)) if isinstance(value, Sequence) and not isinstance(value, str) else 0
