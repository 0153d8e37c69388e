"""Counts the tensors that a run has made and that are still there, in a dry run and in a real one.

Hooks on what autograd saves would miss what a recomputed block keeps, the notes of deferred weight gradients, what a stage has
received and what the step returned; all of these are tensors that an operation has made. Tensors that an operation makes for
itself are none, neither here nor there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lightning_par.private.torch import StorageWeakRef, TorchDispatchMode, has_memory, storage_key
from lightning_par.runtime.nested import tensors_in


class LivingTensors(TorchDispatchMode):
    """While it is entered, knows the storages that were made and are alive, each once, however many views there are.

    Args:
        before: tensors that were there before and do not count, nor do views of them.
        has_peak: whether to find the most bytes at once, after every operation, for `peak_bytes`.
    """

    def __init__(self, before: Iterable[torch.Tensor], has_peak: bool = True) -> None:
        super().__init__()
        # references, so that no key is used again for another storage
        self._before = {storage_key(tensor): StorageWeakRef(tensor.untyped_storage()) for tensor in before if has_memory(tensor)}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._has_peak = has_peak
        self._most = 0  # at least what is alive: what has gone since the last count is in it
        self._peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tensors_in(output):
            if has_memory(tensor):
                self._note(tensor)
        if self._has_peak and self._most > self._peak:
            self._peak = max(self._peak, self.num_bytes())
        return output

    def num_bytes(self, leaving_out: Iterable[int] = ()) -> int:
        """Bytes that are alive now, but for storages with the keys ``leaving_out``, see `storage_key`."""
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        self._most = sum(size for _, size in self._made.values())
        return self._most - sum(self._made[key][1] for key in self._made.keys() & set(leaving_out))

    def alive(self) -> list[tuple[StorageWeakRef, int]]:
        """What is alive now, with its bytes; a reference tells later whether it still is."""
        return [entry for entry in self._made.values() if not entry[0].expired()]

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were alive at once since `forget_peak`."""
        return self._peak

    def forget_peak(self) -> None:
        """Begin to look for the peak anew."""
        self._peak = self.num_bytes()

    def _note(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key in self._before:
            return
        size, known = storage.nbytes(), self._made.get(key)
        if known is None or known[0].expired() or known[1] != size:  # a new one at the place of one that is gone; or it has grown
            self._most += size - (0 if known is None else known[1])
            self._made[key] = (StorageWeakRef(storage), size)
