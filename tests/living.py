"""How much of what code makes is still there afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_par.runtime.nested import tensors_in


class Living(TorchDispatchMode):
    """Counts the bytes of what was made inside and is still there, views of what was there before aside."""

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.before = {tensor.untyped_storage()._cdata for tensor in before}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tensors_in(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.before and not tensor.is_meta:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return output

    def num_bytes(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())
