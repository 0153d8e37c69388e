"""A classification that every machine with Python already has: from which package of the standard library are these lines?"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_par.demo.corpus import list_sources, split_files

PACKAGES = ("asyncio", "concurrent", "ctypes", "email", "html", "http", "idlelib", "importlib", "json", "logging",
            "multiprocessing", "sqlite3", "tkinter", "unittest", "urllib", "xml")  # fmt: skip
START, PAD = 256, 0  # bytes of a text are never 0


class Packages(pl.LightningDataModule):
    """A few lines each of one of 16 packages, split by file into training and validation.

    Batches are as those of `lightning_par.demo.text_files.TextFiles`; tokens are bytes behind a token that starts the text.

    Args:
        length: tokens of a text; longer ones are cut, shorter ones padded.
        batch_size: texts per batch.
        num_lines: of a text.
        seed: order of the training texts; the same in every process.
    """

    def __init__(self, length: int = 128, batch_size: int = 32, num_lines: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.length, self.batch_size, self.num_lines, self.seed = length, batch_size, num_lines, seed

    def setup(self, stage: str) -> None:
        """Read the packages: about 3 MB."""
        files = [file for file in list_sources() if package_of(file) is not None]
        self.training, self.validation = (Snippets(part, self.length, self.num_lines) for part in split_files(files))

    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.training, self.batch_size, shuffle=True, drop_last=True, generator=order)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, self.batch_size)


class Snippets(Dataset):
    """Pieces of files, each with the number of its package.

    Args:
        files: of the packages.
        length: tokens of a piece.
        num_lines: lines of a piece.
    """

    def __init__(self, files: list[Path], length: int, num_lines: int) -> None:
        self.length, self.pieces = length, list[tuple[bytes, int]]()
        for file in files:
            label = package_of(file)
            lines = [line for line in file.read_bytes().splitlines(keepends=True) if line.strip()]
            pieces = (b"".join(lines[start : start + num_lines]) for start in range(0, len(lines), num_lines))
            self.pieces += [(piece, label) for piece in pieces if label is not None]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece, label = self.pieces[index]
        tokens = torch.full((self.length,), PAD)
        text = [START, *piece][: self.length]
        tokens[: len(text)] = torch.tensor(text)
        return {"input_ids": tokens, "attention_mask": (tokens != PAD).long(), "labels": torch.tensor(label)}


def package_of(file: Path) -> int | None:
    """The number of the package that a file is of, if it is of one that counts."""
    package = file.relative_to(sysconfig.get_path("stdlib")).parts[0]
    return PACKAGES.index(package) if package in PACKAGES else None
