"""What it takes to keep optimizer states in files: a folder, direct access to its disk, room there, locked memory.

DeepSpeed checks none of it: it ends the process where memory cannot be locked, and trains on wrong numbers where a disk is full.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_par.errors import ConfigurationError
from lightning_par.private.deepspeed import load_async_io
from lightning_par.zero.optimizer import kept_states
from lightning_par.zero.option import ZeroOptions

SUB_GROUP_ELEMENTS = 100_000_000  # 400 MB for each locked buffer; DeepSpeed's default is ten times that
FP32_BYTES = 4


def check_files(options: ZeroOptions, optimizer: Optimizer, device: torch.device) -> list[str]:
    """Check that this machine can keep the states of an optimizer in files, if the options say so.

    Args:
        options: as the user typed them.
        optimizer: the user's.
        device: where the parameters are.

    Returns:
        The names of what the optimizer keeps for each element of a parameter; none where nothing goes to files.

    Raises:
        ConfigurationError: it cannot; says what is missing.
    """
    if options.nvme_path is None:
        return []
    check_folder(options.nvme_path)
    load_async_io(device)
    return kept_states(optimizer)


def check_folder(path: str) -> None:
    """Check that DeepSpeed can keep files in a folder.

    Raises:
        ConfigurationError: it is not there, cannot be written to, or is on a file system without direct access.
    """
    if not Path(path).is_dir():
        raise ConfigurationError(f"zero.nvme_path={path}: there is no such folder: make one on a disk of each host")
    try:
        with tempfile.NamedTemporaryFile(dir=path) as file:
            _open_directly(file.name)
    except OSError as error:
        raise ConfigurationError(
            f"zero.nvme_path={path}: no file can be written there, past the cache of the system ({error.strerror}): use a folder "
            "of your own on a local disk, with a file system such as ext4 or xfs"
        ) from error


def _open_directly(name: str) -> None:
    os.close(os.open(name, os.O_WRONLY | os.O_DIRECT))


def check_locked_memory(config: Mapping[str, Any], groups: Iterable[Sequence[int]], replicas: int) -> None:
    """Check that this process may lock the memory that DeepSpeed is going to.

    Args:
        config: DeepSpeed's.
        groups: elements of each parameter, by parameter group.
        replicas: ranks that share them.

    Raises:
        ConfigurationError: it may not.
    """
    zero = config["zero_optimization"]
    count = zero.get("offload_optimizer", {}).get("buffer_count")
    if count is None:
        return
    num_bytes = count * FP32_BYTES * largest_group(groups, replicas, int(zero["sub_group_size"]))
    with mmap.mmap(-1, num_bytes) as memory:
        libc, first = ctypes.CDLL(None, use_errno=True), ctypes.c_char.from_buffer(memory)
        area = ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(num_bytes)
        is_locked = libc.mlock(*area) == 0
        reason = os.strerror(ctypes.get_errno())
        if is_locked:
            libc.munlock(*area)
        del first  # else the memory cannot be given back
    if not is_locked:
        raise ConfigurationError(
            f"zero.offload_optimizer=nvme: DeepSpeed locks {num_bytes / 2**20:.1f} MiB of memory on each rank, and that is refused "
            f"({reason}): allow it (ulimit -l unlimited), or make zero.config.zero_optimization.sub_group_size smaller"
        )


def largest_group(groups: Iterable[Sequence[int]], replicas: int, limit: int) -> int:
    """Elements of the largest group that DeepSpeed steps at once: it takes parameter after parameter until it has ``limit``.

    Args:
        groups: elements of each parameter, by parameter group.
        replicas: ranks that share them.
        limit: its ``sub_group_size``.
    """
    largest = 0
    for sizes in groups:
        held = 0
        for size in sizes:
            held += math.ceil(size / replicas)
            largest = max(largest, held)
            held = 0 if held >= limit else held
    return largest


class StateFolder:
    """A folder of one rank in one run, under the user's. It goes when it is closed, at the latest when the process ends.

    Args:
        path: ``zero.nvme_path``, as the user typed it; None for a run without files, which has no folder.
        rank: of this process.
    """

    def __init__(self, path: str | None, rank: int) -> None:
        self.given, self.rank = path, rank
        self.path = None if path is None else tempfile.mkdtemp(prefix=f"lightning_par_rank{rank}_", dir=path)
        if self.path is not None:
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder and what is in it."""
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)

    def config(self, num_states: int) -> dict[str, Any]:
        """Its part of DeepSpeed's configuration.

        Args:
            num_states: what the optimizer keeps for each element.
        """
        if self.path is None:
            return {}
        # a buffer for the masters, one for their gradients, and one for each state
        section = {"nvme_path": self.path, "buffer_count": 2 + num_states}
        return {"zero_optimization": {"offload_optimizer": section, "sub_group_size": SUB_GROUP_ELEMENTS}}

    def reserve(self, files: Mapping[str, int]) -> None:
        """Take the room on the disk that files are going to need.

        Args:
            files: bytes of each, by path.

        Raises:
            ConfigurationError: the disk has not so much.
        """
        try:
            for path, num_bytes in files.items():
                file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
                try:
                    os.posix_fallocate(file, 0, num_bytes)
                finally:
                    os.close(file)
        except OSError as error:
            needed, free = sum(files.values()) / 2**30, shutil.disk_usage(str(self.path)).free / 2**30
            raise ConfigurationError(
                f"zero.nvme_path={self.given}: the states of rank {self.rank} need {needed:.3f} GiB there, of which {free:.3f} GiB "
                f"are still free ({error.strerror}): make room, or use another disk"
            ) from error
