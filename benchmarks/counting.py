"""Counts collectives below every library, and bytes that gloo may still hold.

Whoever asks for a collective (torch.distributed, DTensor, DeepSpeed, lightning_par), it reaches the backend as an operator of
torch: ``c10d::*`` from calls of ``torch.distributed``, ``_c10d_functional::*`` from DTensor. A dispatch mode sees both, in
the backward too: on a CPU autograd runs in the thread that calls it.

Private names, read in torch 2.13: `TorchDispatchMode` has no public place, and `_resolve_process_group` alone leads from the
name in a functional operator to its group.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_par.runtime.nested import tensors_in

# Passes of the whole tensor around the ring, in which each rank sends (t-1)/t of it: an all-reduce is a reduce-scatter and
# an all-gather.
PASSES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
REDUCE = "reduce"  # to one rank, around the ring too: every other rank sends the whole tensor once
_NAMESPACES = ("c10d", "_c10d_functional")
_SENDS_NOTHING = ("wait_tensor", "_wrap_tensor_autograd")


def ring_bytes(kind: str, whole_bytes: int, size: int) -> int:
    """Bytes that one of ``size`` ranks sends for a collective of a tensor of ``whole_bytes``, by the ring algorithm.

    The whole tensor is what an all-reduce reduces, an all-gather returns and a reduce-scatter is given.

    Raises:
        ValueError: the bytes do not divide by ``size``, so that there is no exact number.
    """
    sent, rest = divmod(PASSES[kind] * whole_bytes * (size - 1), size)
    if rest:
        raise ValueError(f"{kind} of {whole_bytes} bytes over {size} ranks: parts must be equal, choose sizes that divide")
    return sent


class CollectiveCounter(TorchDispatchMode):
    """Counts, while it is entered, the collectives of this rank over more than one rank.

    Attributes:
        calls: collectives by kind; one over several tensors at once counts once.
        sent_bytes: what this rank sends for them by the ring formula, by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and count it.

        Raises:
            ValueError: ``func`` communicates in a way that has no formula here: it is never left out of the count.
        """
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor turns it into local operations and collectives, which come back here
        result = func(*args, **(kwargs or {}))
        if func.namespace in _NAMESPACES and func._opname not in _SENDS_NOTHING:
            names = (argument.name for argument in func._schema.arguments)
            self._count(func._opname, {**dict(zip(names, args, strict=False)), **(kwargs or {})}, result)
        return result

    def _count(self, name: str, arguments: Mapping[str, Any], result: Any) -> None:
        kind = next((kind for kind in PASSES if name.replace("_", "").startswith(kind.replace("-", ""))), None)
        size = _group_size(arguments)
        if name == "reduce_":
            self.calls[REDUCE] += 1
            is_root = arguments["root_rank"] == dist.ProcessGroup.unbox(arguments["process_group"]).rank()
            self.sent_bytes[REDUCE] += 0 if is_root else _num_bytes(arguments["tensors"])
            return
        if kind is None:
            raise ValueError(f"{name}: only {', '.join((*PASSES, REDUCE))} have a ring formula here")
        if size > 1:
            self.calls[kind] += 1
            # Whichever of input and output is the whole tensor, it is the larger one.
            self.sent_bytes[kind] += ring_bytes(kind, max(map(_num_bytes, (*arguments.values(), result))), size)


def _group_size(arguments: Mapping[str, Any]) -> int:
    if "process_group" in arguments:
        return dist.ProcessGroup.unbox(arguments["process_group"]).size()
    group: dist.ProcessGroup = _resolve_process_group(arguments["group_name"])
    return group.size()


def _num_bytes(tree: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_in(tree))


def settled(count: Callable[[], int]) -> int:
    """What ``count`` gives when it has not changed for a tenth of a second, at the latest after two seconds.

    gloo's threads let go of tensors a moment after they have said that they are done; on a busy machine that takes a while.
    """
    held, num_equal = count(), 0
    for _ in range(100):
        if held == 0 or num_equal == 5:
            break
        time.sleep(0.02)
        before, held = held, count()
        num_equal = num_equal + 1 if held == before else 0
    return held
