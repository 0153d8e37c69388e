"""Optimizer states of ZeRO-3 that DeepSpeed keeps in files between steps, read and replaced group by group.

DeepSpeed has each group's masters and states in memory while it steps that group, in a few locked buffers that all groups
share. Groups below a megabyte stay in memory for good.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class StateFiles:
    """The groups of a started ZeRO-3 optimizer that are in files.

    Args:
        zero: DeepSpeed's optimizer.
    """

    def __init__(self, zero: Any) -> None:
        self.zero = zero

    def has(self, group: int) -> bool:
        """Whether a group is in files."""
        return bool(self.zero._swappable_optimizer_subgroup(group))

    def give_gradient(self, group: int, gradient: Tensor) -> None:
        """Let the next step take the gradient of a group from memory; DeepSpeed would write it to a file and read it back."""
        self._files_of(group).unswapped_gradients = {0: gradient}

    def read(self, group: int) -> tuple[Tensor, dict[str, Any]]:
        """The masters and the optimizer's states of a group, mapped from their files: what is not looked at takes no memory."""
        files, master = self._files_of(group), self.zero.fp32_partitioned_groups_flat[group]
        size, dtype = files.numel(), files.dtype()
        mapped = {id(each.compute_tensor): torch.from_file(each.swap_path, size=size, dtype=dtype) for each in files.tensors}
        return mapped[id(master)], {key: mapped.get(id(value), value) for key, value in self.zero.optimizer.state[master].items()}

    def to_come(self, states: Iterable[str]) -> dict[str, int]:
        """Bytes of every file that there is going to be, by path.

        Args:
            states: what the optimizer keeps for each element, by name.
        """
        files: dict[str, int] = {}
        for group in filter(self.has, range(len(self.zero.fp16_groups))):
            swapper, masters = self.zero.optimizer_swapper, self._files_of(group)
            folder, name = os.path.split(masters.get_swap_paths()[0])
            num_bytes = swapper._io_aligned_numel(masters.numel()) * swapper.swap_element_size
            files |= {os.path.join(folder, each): num_bytes for each in (name, *(f"{state}-{name}" for state in states))}
        return files

    def forget(self, group: int) -> None:
        """Let new states take the place of those in files when the group is next in memory."""
        if self.has(group):
            files = self._files_of(group)
            files.tensors, files.has_state_tensors = files.tensors[:1], False  # as DeepSpeed's purge_state, of one group

    @contextmanager
    def loaded(self, group: int) -> Iterator[None]:
        """While open, a group is in memory; what was changed is written back."""
        if self.has(group):
            self.zero._optimizer_states_and_gradient_swap_in(group)
        yield
        if self.has(group):
            self.zero._optimizer_states_and_gradient_swap_out(group)

    def _files_of(self, group: int) -> Any:
        return self.zero.optimizer_swapper.swap_params_info[self.zero.fp32_partitioned_groups_flat[group].ds_id]
