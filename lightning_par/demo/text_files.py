"""Your own texts with a class each: JSON lines, and the tokenizer of a model of transformers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset


class TextFiles(pl.LightningDataModule):
    """Texts of ``path/train.jsonl`` and ``path/validation.jsonl``, a line each: ``{"text": "...", "label": 1}``.

    Batches are ``{"input_ids": [B, length], "attention_mask": [B, length], "labels": [B]}`` of int64.

    Args:
        path: the folder.
        tokenizer: name or folder of one of transformers, such as that of the model which is tuned.
        length: tokens of a text; longer ones are cut, shorter ones padded.
        batch_size: texts per batch.
        seed: order of the training texts; the same in every process.
    """

    def __init__(self, path: str, tokenizer: str, length: int = 128, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.path, self.tokenizer = Path(path), tokenizer
        self.length, self.batch_size, self.seed = length, batch_size, seed

    def setup(self, stage: str) -> None:
        """Read the files and the tokenizer."""
        from transformers import AutoTokenizer

        encode = partial(
            AutoTokenizer.from_pretrained(self.tokenizer), max_length=self.length, padding="max_length", truncation=True
        )
        self.training = Texts(self.path / "train.jsonl", encode)
        self.validation = Texts(self.path / "validation.jsonl", encode)

    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.training, self.batch_size, shuffle=True, drop_last=True, generator=order)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, self.batch_size)


class Texts(Dataset):
    """The texts of a file, encoded as they are asked for.

    Args:
        file: of JSON lines.
        encode: a tokenizer with its options.
    """

    def __init__(self, file: Path, encode: Any) -> None:
        self.lines, self.encode = [json.loads(line) for line in file.read_text().splitlines()], encode

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        line = self.lines[index]
        encoded = self.encode(line["text"])
        names = ("input_ids", "attention_mask")
        return {**{name: torch.tensor(encoded[name]) for name in names}, "labels": torch.tensor(line["label"])}
