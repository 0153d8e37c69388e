"""Your own images: a folder for each class, as ImageNet is usually unpacked."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from lightning_par.demo.glyphs import pixels

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


class ImageFolder(pl.LightningDataModule):
    """Images of ``path/train/CLASS/`` and ``path/val/CLASS/``, labels in the alphabetical order of the classes.

    Batches are as those of `lightning_par.demo.glyphs.Glyphs`. Training sees random crops, flipped or not, as in Inception
    (arXiv 1409.4842, section 6); validation the middle.

    Args:
        path: the folder.
        image_size: pixels of a side.
        batch_size: images per batch.
        num_workers: processes of each rank that read and decode.
        seed: order of the training images; the same in every process.
    """

    def __init__(self, path: str, image_size: int = 224, batch_size: int = 128, num_workers: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.path, self.image_size = Path(path), image_size
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    def setup(self, stage: str) -> None:
        """List the files."""
        self.training = Images(self.path / "train", partial(random_crop, size=self.image_size))
        self.validation = Images(self.path / "val", partial(middle_crop, size=self.image_size))

    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            self.training, self.batch_size, shuffle=True, drop_last=True, generator=order, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, self.batch_size, num_workers=self.num_workers)


class Images(Dataset):
    """The images of a folder of classes.

    Args:
        folder: of the classes.
        crop: makes a picture of one size of any.

    Raises:
        FileNotFoundError: there are none.
    """

    def __init__(self, folder: Path, crop: Callable[[Image.Image], Image.Image]) -> None:
        self.crop = crop
        classes = sorted(each for each in folder.glob("*") if each.is_dir())
        self.files = [
            (file, label)
            for label, each in enumerate(classes)
            for file in sorted(each.rglob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise FileNotFoundError(f"{folder} has no images: data.path needs train/CLASS/*.jpg and val/CLASS/*.jpg")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        file, label = self.files[index]
        with Image.open(file) as picture:
            return {"pixel_values": pixels(self.crop(picture.convert("RGB"))), "labels": torch.tensor(label)}


def random_crop(picture: Image.Image, size: int) -> Image.Image:
    """8 % to all of the picture's area, 3:4 to 4:3, flipped half of the time; as torchvision's RandomResizedCrop."""
    width, height = picture.size
    area, ratio = width * height * random.uniform(0.08, 1), math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    wide, high = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = random.uniform(0, width - wide), random.uniform(0, height - high)
    cropped = picture.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + wide, top + high))
    return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else cropped


def middle_crop(picture: Image.Image, size: int) -> Image.Image:
    """The middle 7/8 of the shorter side, square."""
    width, height = picture.size
    side = min(width, height) * 7 / 8
    left, top = (width - side) / 2, (height - side) / 2
    return picture.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
