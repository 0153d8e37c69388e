"""What selective recomputation keeps of a block's forward (arXiv 2205.05198, section 5).

Kept are results that are costly to make: products with weights, fused attention, and what collectives have written.
Norms, activation functions, dropout, and the scores and the softmax of attention that is not fused are computed again.

torch has a pair of contexts for this, `torch.utils.checkpoint.create_selective_checkpoint_contexts`. It replays every
operation by its number, and refuses to go on where the backward runs others (the hooks of ZeRO-3 do) or where a kept result was
changed in place (``nn.ReLU(inplace=True)``); of a collective, which writes into its argument, it keeps nothing of use. Here
only what is kept is counted, and a result that was changed is made again.

A product that only goes into a sum over ranks is not kept beside the sum.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from lightning_par.errors import ModelError
from lightning_par.private.torch import TorchDispatchMode, alias_below_autograd, finished_work, storage_key
from lightning_par.runtime.axis import Axis, GroupAxis
from lightning_par.runtime.imagined import ImaginedAxis, Watcher
from lightning_par.runtime.nested import map_tensors, tensors_in

_aten, _c10d = torch.ops.aten, torch.ops.c10d
PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default, _aten.convolution.default})
# operation -> position of dropout_p. One that draws is made again: kept, it would leave the generator where the draws after it
# come out differently
ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default: 3,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: 3,
    _aten._scaled_dot_product_efficient_attention.default: 5,
    _aten._scaled_dot_product_cudnn_attention.default: 5,
}
# operation -> position of the process group. They write into their first argument
COLLECTIVES = {
    _c10d.allreduce_.default: 1,
    _c10d.allgather_.default: 2,
    _c10d._allgather_base_.default: 2,
    _c10d.reduce_scatter_.default: 2,
    _c10d._reduce_scatter_base_.default: 2,
}
# views; and a fake tensor is asked for its device by an operation
_READING_NOTHING = frozenset(
    {_aten.view.default, _aten._unsafe_view.default, _aten.detach.default, _aten.alias.default, torch.ops.prim.device.default}
)


def keeping(axis: Axis) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts for one forward of a block and for its recomputations.

    Args:
        axis: keep the results of its collectives, and not those of others: ZeRO-3 gathers parameters.
    """
    kept = Kept(axis.group if isinstance(axis, GroupAxis) else None)
    return _Keep(kept, axis.watchers if isinstance(axis, ImaginedAxis) else []), _Replay(kept)


def is_costly(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the result of an operation, other than a collective, is worth its memory."""
    if function in ATTENTION:
        place = ATTENTION[function]
        return not (args[place] if len(args) > place else kwargs.get("dropout_p", 0.0))
    return function in PRODUCTS


@dataclass
class Kept:
    """What is kept of one forward of a block.

    Attributes:
        group: whose collectives count.
        results: by operation, in the order of its calls.
    """

    group: dist.ProcessGroup | None
    results: defaultdict[Any, list[Result]] = field(default_factory=lambda: defaultdict(list))

    def is_ours(self, function: Any, args: tuple[Any, ...]) -> bool:
        """Whether an operation is a collective of the group."""
        place = COLLECTIVES.get(function)
        if place is None or self.group is None:
            return False
        return dist.ProcessGroup.unbox(args[place]).group_name == self.group.group_name


@dataclass
class Result:
    """A kept result.

    Attributes:
        value: aliases of its tensors; on the meta device for a product that is not kept beside its sums.
        work: the handle of a collective, until the block has ended: it holds the hooks that were on when it began, which hold all
            that is kept of the block, in a circle that no garbage collector sees.
        versions: how often each tensor had been changed when it was made.
        is_read: whether an operation has read it; of a product, other than to sum it.
        sums: what collectives made of a product.
        is_needed: whether the product that was summed is not kept, so that the sum cannot be made again.
    """

    value: Any
    work: Any = None
    versions: list[int] = field(init=False)
    is_read: bool = False
    sums: list[Result] = field(default_factory=list)
    is_needed: bool = False

    def __post_init__(self) -> None:
        self.value = map_tensors(alias_below_autograd, self.value)
        self.versions = self._versions()

    @property
    def is_changed(self) -> bool:
        """Whether the user's code has changed the result in place since."""
        return self._versions() != self.versions

    def note_read(self) -> None:
        """To be called before an operation reads the result. Until then gloo may still copy a collective's into it."""
        if self.work is not None and not self.is_read:
            self.versions = self._versions()
        self.is_read = True

    def drop_product(self) -> None:
        """Leave the shape alone of a product that is read by sums only, where these are as they were."""
        if self.sums and not self.is_read and not any(total.is_changed for total in self.sums):
            self.value = map_tensors(lambda tensor: tensor.to("meta"), self.value)
            self.versions = self._versions()
            for total in self.sums:
                total.is_needed = True

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in tensors_in(self.value)]


class _Keep(TorchDispatchMode):
    """Runs every operation and keeps some results.

    Args:
        kept: where.
        watchers: of collectives that are no operations.
    """

    def __init__(self, kept: Kept, watchers: list[Watcher]) -> None:
        super().__init__()
        self._kept, self._watchers = kept, watchers
        self._watched: dict[int, Result] = {}  # by the storage of a result, or of a product's copy that is not summed yet
        self._copies: list[torch.Tensor] = []  # alive, so that no storage is taken for another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_ours = self._kept.is_ours(func, args)
        copied = self._product(args[0]) if func is _aten.clone.default else None
        if not (is_ours or copied or func in _READING_NOTHING):
            self._note_reads(args[1:] if func is _aten.copy_.default else args, kwargs)  # which writes its first one
        output = func(*args, **kwargs)
        if copied is not None:
            self._watched[storage_key(output)] = copied
            self._copies.append(alias_below_autograd(output))
        elif is_ours:
            self._keep_collective(func, args[0], args, output[-1])
        elif is_costly(func, args, kwargs):
            self._keep(func, Result(output))
        return output

    def __enter__(self) -> Any:
        self._watchers.append(self._keep_imagined)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._watchers.remove(self._keep_imagined)
        for result in self._watched.values():
            if result.work is not None:
                result.note_read()
                result.work = None
        for func in PRODUCTS & self._kept.results.keys():
            for product in self._kept.results[func]:
                product.drop_product()
        self._watched, self._copies = {}, []
        super().__exit__(*raised)

    def _keep(self, func: Any, result: Result) -> None:
        self._kept.results[func].append(result)
        for tensor in tensors_in(result.value):
            self._watched[storage_key(tensor)] = result

    def _keep_imagined(self, written: torch.Tensor, read: torch.Tensor) -> None:
        self._keep_collective(ImaginedAxis, written, read, work=ImaginedAxis)  # a handle of any kind tells it from a product

    def _keep_collective(self, func: Any, written: Any, args: Any, work: Any) -> None:
        result = Result(written, work=work)
        for tensor in tensors_in(args):
            product = self._product(tensor)
            if product is not None:
                product.sums.append(result)
        self._keep(func, result)  # in the place of a copy that it was written into

    def _product(self, tensor: torch.Tensor) -> Result | None:
        result = self._watched.get(storage_key(tensor))
        return result if result is not None and result.work is None else None

    def _note_reads(self, args: Any, kwargs: Any) -> None:
        for tensor in tensors_in((args, kwargs)) if self._watched else ():
            result = self._watched.get(storage_key(tensor))
            if result is not None:
                result.note_read()


class _Replay(TorchDispatchMode):
    """Gives kept results back and runs all else."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self._kept = kept
        self._left: dict[Any, deque[Result]] = {}

    def __enter__(self) -> Any:
        self._left = {func: deque(results) for func, results in self._kept.results.items()}
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_ours = self._kept.is_ours(func, args)
        if not (is_ours or is_costly(func, args, kwargs)) or not self._left.get(func):
            return func(*args, **kwargs)
        result = self._left[func].popleft()
        if result.is_changed:
            _check_can_be_made(result)
            return func(*args, **kwargs)
        if not is_ours:
            return map_tensors(lambda tensor: _given_back(tensor, args[0].device), result.value)
        for tensor, written in zip(tensors_in(args[0]), tensors_in(result.value), strict=True):
            tensor.copy_(written)
        return args[0], finished_work()


def _check_can_be_made(result: Result) -> None:
    if result.is_needed:
        raise ModelError(
            "recompute=selective: the sum of a row layer was changed in place after its block had ended, and is needed to "
            "compute the block again: change a copy of it, or use recompute=full"
        )


def _given_back(kept: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The kept tensor, for autograd to attach to; numbers that nothing reads for a product that only its sums have."""
    return torch.empty_like(kept, device=device) if kept.is_meta else alias_below_autograd(kept)
