"""How a folder comes to be there, whole or not at all, and how ranks agree on whether it did.

A save is written beside its place and renamed when the files of every rank are on the disk::

    .last.ckpt.saving      being written; never read; the next save of the same name removes what a killed one left
    .last.ckpt.earlier     the one that is being replaced, for the moment between two renames; read where last.ckpt is missing
    last.ckpt              whole
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist

from lightning_par.checkpoint.shard_file import sync
from lightning_par.errors import CheckpointError

T = TypeVar("T")


def draft_of(path: Path) -> Path:
    """Where a checkpoint is written before it is published."""
    return path.with_name(f".{path.name}.saving")


def earlier_of(path: Path) -> Path:
    """Where the one is that is being replaced."""
    return path.with_name(f".{path.name}.earlier")


def find_published(path: Path) -> Path:
    """The folder to read for ``path``: itself, or the one that a save was about to replace when it was killed."""
    return earlier_of(path) if not path.exists() and earlier_of(path).is_dir() else path


def open_draft(path: Path) -> None:
    """Make an empty draft."""
    remove(draft_of(path))
    draft_of(path).mkdir(parents=True)


def publish(path: Path) -> None:
    """Put a whole draft in its place."""
    earlier = earlier_of(path)
    sync(draft_of(path))
    if path.exists() or path.is_symlink():
        remove(earlier)
        path.rename(earlier)  # kept until the new one is in its place
    draft_of(path).rename(path)
    sync(path.parent)
    remove(earlier)


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it is there. A folder is put aside first, so that no half one is ever seen."""
    if path.is_dir() and not path.is_symlink():
        aside = path.with_name(f".{path.name.lstrip('.')}.removed")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)


def together(group: dist.ProcessGroup | None, what: str, action: Callable[[], T]) -> list[T]:
    """Run a part of a save or a load on every rank; either all go on, or all raise the same. Collective over ``group``.

    Args:
        group: all ranks; None for a process alone.
        what: what it is, for the error: ``last.ckpt could not be written``.
        action: this rank's part.

    Returns:
        What it returned on each rank.

    Raises:
        CheckpointError: on some rank it raised an error; says on which.
    """
    result, words = None, ""
    try:
        result = action()
    except CheckpointError as error:
        words = str(error)
    except OSError as error:
        words = f"{what}: {error.strerror or error}{f': {error.filename}' if error.filename else ''} ({_remedy(error)})"
    reports: list[tuple[T | None, str, str]] = [(result, words, socket.gethostname())]
    if group is not None:
        reports = [reports[0]] * dist.get_world_size(group)
        dist.all_gather_object(reports, (result, words, socket.gethostname()), group=group)
    failed = [(rank, words, host) for rank, (_, words, host) in enumerate(reports) if words]
    if failed:
        rank, words, host = failed[0]
        where = f"rank {rank} on {host}: " if len(reports) > 1 else ""
        raise CheckpointError(f"{where}{words}")
    return [cast(T, result) for result, _, _ in reports]


def _remedy(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "all hosts must see the same folder: use one on a disk that they share"
    if isinstance(error, PermissionError) or error.errno == 30:
        return "make it writable, or choose another folder"
    if error.errno in (28, 122):
        return "free some space; the checkpoints that were there are whole"
    return "the checkpoints that were there are whole"
