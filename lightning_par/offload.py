"""Activations that wait for the backward in the memory of the host, block by block.

What autograd saves of a block's forward goes to the host when it is saved, and comes back when the backward asks for it. On a GPU
the host's memory is pinned and the copies run beside the computation, on a stream of their own; on a CPU it is a plain copy. What
several operations save is copied once; parameters and buffers, which stay anyway, not at all. Of a block that is computed again in
full it is the inputs that go.

``torch.autograd.graph.save_on_cpu`` copies each tensor as often as it is saved, weights included, on the stream of the computation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_par.plan import Plan
from lightning_par.private.torch import Place, StorageWeakRef, is_fake, place_of, storage_key
from lightning_par.runtime.call import change_call


def offload_blocks(module: nn.Module, plan: Plan, pp: int, device: torch.device) -> None:
    """Change the calls of this rank's blocks that the plan offloads, in place. Not a collective.

    To be done after blocks are recomputed and before the stages are cut.

    Args:
        module: the module, its layers converted.
        plan: all decisions.
        pp: this rank's pp coordinate.
        device: where the module is going to run.
    """
    if plan.chain is None or not any(plan.chain.offload_activations):
        return
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for index in plan.blocks_at(pp):
        if plan.chain.offload_activations[index]:
            block = module.get_submodule(plan.chain.blocks[index])
            change_call(block, _offloading(type(block), stream))


def _offloading(cls: type[nn.Module], stream: torch.cuda.Stream | None) -> Callable[..., Any]:
    def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return cls.__call__(block, *args, **kwargs)
        with _Offload(block, stream).hooks:
            return cls.__call__(block, *args, **kwargs)

    return call


class _Offload:
    """What goes to the host in one call of a block."""

    def __init__(self, block: nn.Module, stream: torch.cuda.Stream | None) -> None:
        self._block, self._stream = block, stream
        self._copies: weakref.WeakValueDictionary[tuple[Place, int], _HostCopy] = weakref.WeakValueDictionary()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Packed:
        shape = tensor.shape
        flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach()  # as a layer and what is before it show it
        place = place_of(flat)
        if place is None or self._stays(tensor):
            return tensor
        key = place, tensor._version
        known = self._copies.get(key)
        if known is None or known.source.expired():  # else another tensor lies where it was
            known = self._copies[key] = _HostCopy(flat, self._stream)
        return _Packed(known, shape)

    def _stays(self, tensor: torch.Tensor) -> bool:
        """Whether its memory stays: the host's already, a parameter's or buffer's of now, or of fewer numbers than it shows."""
        if self._stream is not None and not tensor.is_cuda:  # such as the mark that torch's checkpoint saves
            return True
        if tensor.nbytes > tensor.untyped_storage().nbytes() or not tensor.ndim:
            return True
        key = storage_key(tensor)  # ZeRO-3 gathers parameters while the block runs
        return any(storage_key(held) == key for held in (*self._block.parameters(), *self._block.buffers()))


class _HostCopy:
    """A tensor on the host.

    Attributes:
        source: the storage that it was copied from.
    """

    def __init__(self, tensor: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        self.source = StorageWeakRef(tensor.untyped_storage())
        self._device, self._done = tensor.device, None
        self._back: weakref.ref[torch.Tensor] | None = None
        host = torch.device("meta" if is_fake(tensor) else "cpu")  # in a dry run, memory that is not the device's
        self._copy = torch.empty_like(tensor, device=host, pin_memory=stream is not None and host.type == "cpu")
        if host.type == "meta":
            return
        if stream is None:
            self._copy.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._copy.copy_(tensor, non_blocking=True)
            self._done = stream.record_event()
        tensor.record_stream(stream)  # its memory is not given to another before the copy is made

    def fetch(self) -> torch.Tensor:
        """The tensor on its device; the same one while somebody has it."""
        back = None if self._back is None else self._back()
        if back is None:
            if self._done is not None:
                self._done.wait(torch.cuda.current_stream(self._device))
            back = torch.empty_like(self._copy, device=self._device)
            if self._copy.device.type != "meta":
                back.copy_(self._copy, non_blocking=True)
            self._back = weakref.ref(back)
        return back


class _Packed(NamedTuple):
    """What autograd keeps in the place of a tensor."""

    copy: _HostCopy
    shape: torch.Size


def _unpack(packed: torch.Tensor | _Packed) -> torch.Tensor:
    return packed.copy.fetch().view(packed.shape) if isinstance(packed, _Packed) else packed
