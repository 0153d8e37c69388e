"""Old checkpoints, and what killed saves have left."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lightning_par.checkpoint.index import INDEX
from lightning_par.checkpoint.load import Checkpoint
from lightning_par.errors import CheckpointError, ConfigurationError


class Pruning(NamedTuple):
    """What would be removed of a folder.

    Attributes:
        leftovers: of saves that were killed.
        outdated: whole checkpoints, the oldest first.
        kept: whole checkpoints, the newest last.
        damaged: errors of checkpoints that cannot be opened; they are left, and count as none.
    """

    leftovers: list[Path]
    outdated: list[Path]
    kept: list[Path]
    damaged: list[str]


def find_prunable(folder: Path, keep: int | None) -> Pruning:
    """Find out what may be removed.

    Args:
        folder: with checkpoints in it. No run may be saving into it.
        keep: how many of the newest to keep, by when they were written; None for all. What a link in the folder leads to is kept.

    Raises:
        ConfigurationError: there is no such folder, or none would be kept.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: there is no such folder: give the one that has the checkpoints in it")
    if keep is not None and keep < 1:
        raise ConfigurationError(f"--keep {keep} would keep no checkpoint: keep at least 1")
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.is_symlink()]
    drafts = [path for path in inside if _is_hidden(path, "saving") or _is_hidden(path, "removed")]
    whole, damaged = [], []
    for path in inside:
        if path in drafts or not (path / INDEX).is_file():
            continue
        try:
            Checkpoint(path)
            whole.append(path)
        except CheckpointError as error:
            damaged.append(str(error))
    replaced = [path for path in whole if _is_hidden(path, "earlier") and _place_of(path) in whole]
    whole = [path for path in whole if path not in replaced]
    whole.sort(key=lambda path: (path / INDEX).stat().st_mtime_ns)
    linked = {path.resolve() for path in folder.iterdir() if path.is_symlink()}
    outdated = [path for path in whole[:-keep] if path.resolve() not in linked] if keep else []
    return Pruning(drafts + replaced, outdated, [path for path in whole if path not in outdated], damaged)


def _is_hidden(path: Path, state: str) -> bool:
    """Whether it has a name such as ``.last.ckpt.saving``; see `lightning_par.checkpoint.publish`."""
    return path.name.startswith(".") and path.name.endswith(f".{state}") and path.name != f".{state}"


def _place_of(path: Path) -> Path:
    return path.with_name(path.name.removeprefix(".").rpartition(".")[0])
