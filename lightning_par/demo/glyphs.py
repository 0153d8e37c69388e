"""Images that every machine with matplotlib can draw: letters in many fonts, sizes, places, angles and colours."""

from __future__ import annotations

import random
import string
from pathlib import Path

import matplotlib
import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset

LETTERS = string.ascii_uppercase
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic")


class Glyphs(pl.LightningDataModule):
    """Pictures of one letter each, to be told apart.

    Batches are ``{"pixel_values": [B, 3, image_size, image_size] of float32 from -1 to 1, "labels": [B]}``. Validation has other
    pictures, and one font that training does not see.

    Args:
        image_size: pixels of a side.
        batch_size: pictures per batch.
        num_training, num_validation: pictures.
        num_workers: processes of each rank that draw.
        seed: order of the training pictures; the same in every process.
    """

    def __init__(
        self,
        image_size: int = 32,
        batch_size: int = 64,
        num_training: int = 26_000,
        num_validation: int = 520,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.training = Letters(num_training, image_size, FONTS[:-1])
        self.validation = Letters(num_validation, image_size, FONTS, first=num_training)

    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            self.training, self.batch_size, shuffle=True, drop_last=True, generator=order, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, self.batch_size, num_workers=self.num_workers)


class Letters(Dataset):
    """Pictures by number: a number has the same picture on every machine and in every epoch.

    Args:
        count: of pictures.
        size: pixels of a side.
        fonts: names of those of matplotlib.
        first: number of the first picture.
    """

    def __init__(self, count: int, size: int, fonts: tuple[str, ...], first: int = 0) -> None:
        self.count, self.size, self.fonts, self.first = count, size, fonts, first
        self.folder = Path(matplotlib.get_data_path(), "fonts", "ttf")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        chosen, label = random.Random(self.first + index), (self.first + index) % len(LETTERS)
        height = int(self.size * chosen.uniform(0.6, 0.85))
        font = ImageFont.truetype(str(self.folder / f"{chosen.choice(self.fonts)}.ttf"), height)
        paper, ink = (tuple(chosen.randint(low, low + 80) for _ in range(3)) for low in (175, 0))
        picture = Image.new("RGB", (self.size, self.size), paper)
        left, top = (self.size * chosen.uniform(0.44, 0.56) for _ in range(2))
        ImageDraw.Draw(picture).text((left, top), LETTERS[label], fill=ink, font=font, anchor="mm")
        return {"pixel_values": pixels(picture.rotate(chosen.uniform(-10, 10), fillcolor=paper)), "labels": torch.tensor(label)}


def pixels(picture: Image.Image) -> torch.Tensor:
    """An RGB picture as float32 [3, H, W] from -1 to 1, as ViT was trained on."""
    return torch.from_numpy(np.asarray(picture).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1))
