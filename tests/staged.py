"""A process group through which ranks that share one GPU can talk: NCCL refuses two ranks on a device.

Tensors on the GPU are copied to the host, sent by gloo, and what arrives is copied back. So a machine with one GPU runs every
layout, with the device's own kernels, streams, generators and allocator; only NCCL is not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

NAME = "staged"
_GLOO = dist.ProcessGroup.BackendType.GLOO
# Those that torch calls on a group; it has renamed some (2.13). The first argument is what they write, but for `send`.
_WRITING = """allreduce allreduce_coalesced broadcast reduce allgather _allgather_base all_gather_single allgather_coalesced
allgather_into_tensor_coalesced all_gather_single_coalesced gather scatter reduce_scatter _reduce_scatter_base reduce_scatter_single
reduce_scatter_tensor_coalesced reduce_scatter_single_coalesced alltoall alltoall_base all_to_all_single recv""".split()


class StagedWork(dist._Work):
    """Waits for gloo's work, then copies what it has received to where it was to go."""

    def __init__(self, work: Any, arriving: list[tuple[torch.Tensor, torch.Tensor]], kept: Any) -> None:
        super().__init__()
        self._work, self._arriving, self._kept = work, arriving, kept

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self._work is not None:
            self._work.wait()
        for target, copy in self._arriving:
            target.data.copy_(copy)  # .data: a collective does not count as a change either
        self._work, self._arriving, self._kept = None, [], None
        return True

    def is_completed(self) -> bool:
        return not self._arriving and (self._work is None or self._work.is_completed())


class StagedGroup(dist.ProcessGroup):
    """Gloo for tensors on the host and, by way of the host, for those on a GPU."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo, self._name = dist.ProcessGroup(store, rank, size), ""
        self._gloo._set_default_backend(_GLOO)
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        gloo._set_sequence_number_for_group()
        self._gloo._register_backend(torch.device("cpu"), _GLOO, gloo)

    def barrier(self, *args: Any, **kwargs: Any) -> Any:
        return self._gloo.barrier()

    def send(self, tensors: list[torch.Tensor], destination: int, tag: int) -> Any:
        copies = [tensor.cpu() for tensor in tensors]
        return StagedWork(self._gloo.send(copies, destination, tag), [], copies)

    def getBackendName(self) -> str:
        return NAME

    @property
    def pg_name(self) -> str:
        return self._name

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name


def _through_the_host(name: str) -> Callable[..., Any]:
    def call(self: StagedGroup, first: Any, *rest: Any) -> StagedWork:
        arriving: list[tuple[torch.Tensor, torch.Tensor]] = []
        staged_first = _map(lambda tensor: _stage(tensor, arriving), first)
        staged_rest = [_map(torch.Tensor.cpu, argument) for argument in rest]
        return StagedWork(getattr(self._gloo, name)(staged_first, *staged_rest), arriving, staged_rest)

    call.__name__ = name
    return call


def _stage(tensor: torch.Tensor, arriving: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    copy = tensor.detach().cpu()
    if tensor.is_cuda:
        arriving.append((tensor, copy))
    return copy


def _map(function: Callable[[torch.Tensor], torch.Tensor], argument: Any) -> Any:
    if isinstance(argument, list):
        return [_map(function, each) for each in argument]
    return function(argument) if isinstance(argument, torch.Tensor) else argument


for _name in _WRITING:
    if hasattr(dist.ProcessGroup, _name):
        setattr(StagedGroup, _name, _through_the_host(_name))


def register() -> None:
    """Make the backend known to this process, for the host's tensors and the GPU's."""
    dist.Backend.register_backend(NAME, StagedGroup, devices=["cpu", "cuda"])
