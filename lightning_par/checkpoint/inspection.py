"""What is in a checkpoint, and whether it is whole; without a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_par.checkpoint.box import Box
from lightning_par.checkpoint.load import Checkpoint
from lightning_par.checkpoint.shard_file import Shards
from lightning_par.errors import CheckpointError
from lightning_par.zero.held import WEIGHT


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What ``checkpoint show`` shows, as JSON holds it. Reads no tensor."""
    saved = checkpoint.trainer()
    trainer, run, index = saved["trainer"], saved["run"], checkpoint.index
    tensors = [
        {
            "name": name,
            "aliases": entry.aliases,
            "kind": entry.kind,
            "shape": list(entry.shape),
            "dtype": entry.dtype,
            "values": {
                what: {"dtype": each.dtype, "bytes": _bytes(entry.shape, each.dtype), "pieces": len(each.pieces)}
                for what, each in sorted(entry.values.items(), key=lambda item: (item[0] != WEIGHT, item[0]))
            },
        }
        for name, entry in index.entries.items()
    ]
    totals: Counter[str] = Counter()
    for entry in index.entries.values():
        totals.update({what: _bytes(entry.shape, each.dtype) for what, each in sorted(entry.values.items())})
    return {
        "folder": str(checkpoint.folder),
        "layout": index.layout,
        "epoch": trainer.get("epoch"),
        "step": trainer.get("global_step"),
        "precision": run.get("precision"),
        "optimizers": run.get("optimizers", []),
        "tensors": tensors,
        "bytes_by_kind": dict(totals),
        "files": {name: size for name, (size, _) in index.files.items()},
        "pickled": checkpoint.odd_places(),
    }


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * getattr(torch, dtype).itemsize


def find_damage(path: Path, advance: Callable[[int, int], None]) -> list[str]:
    """Read everything in a checkpoint and compare it with its checksums.

    Args:
        path: the folder.
        advance: called with the bytes read so far, and those there are.

    Returns:
        A message for each damaged file, with the tensors that it held; nothing where all is whole.
    """
    try:
        checkpoint = Checkpoint(path)
        checkpoint.trainer()
    except CheckpointError as error:
        return [str(error)]
    shards = Shards(checkpoint.folder, checkpoint.index)
    faults: dict[str, str] = {}
    done = 0
    pieces = [
        (name, piece, piece.box.numel * getattr(torch, values.dtype).itemsize)
        for name, entry in checkpoint.index.entries.items()
        for values in entry.values.values()
        for piece in values.pieces
    ]
    total = sum(size for _, _, size in pieces)
    for name, piece, size in pieces:
        try:
            shards.read(name, piece, Box((0,) * len(piece.box.shape), piece.box.shape))
        except CheckpointError as error:
            faults.setdefault(piece.file, str(error))
        done += size
        advance(done, total)
    return [faults[file] for file in sorted(faults)]
