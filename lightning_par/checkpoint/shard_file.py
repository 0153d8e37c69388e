"""The files of a checkpoint: pieces of tensors, as safetensors; written to the disk before anyone is told."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_par.checkpoint.box import Box
from lightning_par.checkpoint.index import Index, Piece, checksum_of, held_in
from lightning_par.errors import CheckpointError


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, which is still to be synced. The tensors are contiguous and on the CPU.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def write_text(path: Path, text: str) -> None:
    """Write a file, down to the disk."""
    path.write_text(text)
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU, as a buffer."""
    return tensor.view(-1).view(torch.uint8).numpy()


class Shards:
    """Reads pieces of tensors. A file stays open as long as this lives; a piece is checked when it is first read.

    Args:
        folder: of the checkpoint.
        index: its index.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._index = folder, index
        self._files: dict[str, safe_open] = {}
        self._checked: set[tuple[str, str]] = set()

    def read(self, name: str, piece: Piece, box: Box) -> Tensor:
        """A box of a piece, of which nothing may be changed.

        Args:
            name: of the tensor, for errors.
            piece: which piece.
            box: what is wanted, counted from where the piece begins.

        Raises:
            CheckpointError: the piece is damaged.
        """
        try:
            if piece.file not in self._files:
                self._files[piece.file] = safe_open(self._folder / piece.file, "pt")
            whole: Tensor = self._files[piece.file].get_tensor(piece.key)
            if (piece.file, piece.key) not in self._checked:
                if tuple(whole.shape) != piece.box.shape or checksum_of(bytes_of(whole)) != piece.checksum:
                    raise SafetensorError(f"the checksum of {piece.key} does not fit")
                self._checked.add((piece.file, piece.key))
            return box.of(whole)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self._folder / piece.file} is damaged: {name}: {error}{held_in(self._index, piece.file)}: use another checkpoint"
            ) from None
