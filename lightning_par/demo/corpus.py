"""A corpus that every machine with Python already has: the source text of Python's own standard library."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

# Installed packages and tests are not the library; encodings and pydoc_data are tables, 2 of its 11 MB.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
VALIDATION_EVERY = 20  # one file in twenty is held out
SEPARATOR = b"\n\n\n"


class StandardLibrary(pl.LightningDataModule):
    """Windows of bytes from the standard library's sources, split by file into training and validation.

    Batches are ``{"tokens": [B, context], "targets": [B, context]}`` of int64, targets one byte later.

    Args:
        context: bytes per window.
        batch_size: windows per batch.
        num_validation_windows: size of the validation set, spread evenly over the held-out files.
        seed: order of the training windows; the same in every process.
    """

    def __init__(self, context: int = 128, batch_size: int = 16, num_validation_windows: int = 256, seed: int = 0) -> None:
        super().__init__()
        self.context, self.batch_size = context, batch_size
        self.num_validation_windows, self.seed = num_validation_windows, seed

    def setup(self, stage: str) -> None:
        """Read the corpus: about 9 MB, well under a second."""
        training, validation = split_files(list_sources())
        self.training_windows = Windows(read_text(training), self.context)
        self.validation_windows = Windows(read_text(validation), self.context, self.num_validation_windows)

    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.training_windows, self.batch_size, shuffle=True, drop_last=True, generator=order)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation_windows, self.batch_size)


class Windows(Dataset):
    """Windows of a text and of the same text one byte later.

    Args:
        text: uint8 [N].
        context: bytes per window.
        count: number of windows, spread evenly; by default as many as fit without overlap.
    """

    def __init__(self, text: torch.Tensor, context: int, count: int | None = None) -> None:
        self.text, self.context = text, context
        most = (len(text) - 1) // context
        self.count = min(count or most, most)
        self.stride = (len(text) - 1 - context) // max(1, self.count - 1)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self.stride
        window = self.text[start : start + self.context + 1].long()
        return {"tokens": window[:-1], "targets": window[1:]}


def list_sources() -> list[Path]:
    """The library's own source files, in the same order on every machine."""
    root, sources = sysconfig.get_path("stdlib"), []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        sources += [Path(folder, file) for file in sorted(files) if file.endswith(".py")]
    return sources


def split_files(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Training and validation files; no file is in both."""
    validation = files[::VALIDATION_EVERY]
    held_out = set(validation)
    return [file for file in files if file not in held_out], validation


def read_text(files: list[Path]) -> torch.Tensor:
    """The files' bytes, one after another, as uint8 [N]."""
    text = SEPARATOR.join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
