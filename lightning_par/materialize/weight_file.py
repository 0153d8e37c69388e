"""Weights in safetensors files, as ``save_pretrained`` of transformers writes them: what there is, and reading parts of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lightning_par.errors import ConfigurationError
from lightning_par.runtime.parameter import Split

_BLOCK = 1 << 24  # bytes that are read at once; a file is closed after each, so that its pages are no longer this process's


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read_shard(
        self, split: Split | None, size: int, coordinate: int, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One rank's shard, in ``out`` or contiguous and in ``dtype``. Memory: the shard and a block of 16 MiB."""
        split = None if size == 1 else split
        local_shape = self.shape if split is None else split.local_shape(self.shape, size)
        shard = torch.zeros(local_shape, dtype=dtype) if out is None else out.zero_()
        if not self.shape:
            with safe_open(self.file, "pt") as opened:
                return shard.copy_(opened.get_tensor(self.name))
        dim = 0 if split is None else split.dim
        for first, count, local in [(0, self.shape[0], 0)] if split is None else split.parts(size, coordinate):
            wanted = slice(first, first + count)
            rows = range(first, first + count) if dim == 0 else range(self.shape[0])
            for block in _blocks(rows, math.prod(self.shape[1:]) * 4):
                with safe_open(self.file, "pt") as opened:
                    stored = opened.get_slice(self.name)
                    if dim == 0:
                        shard[local + block.start - first : local + block.stop - first] = stored[block]
                    else:
                        between = (slice(None),) * (dim - 1)
                        there, here = (block, *between, wanted), (block, *between, slice(local, local + count))
                        shard[here] = stored[there]
        return shard


def _blocks(rows: range, row_bytes: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(row_bytes, 1))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a safetensors file, or of a folder with one, or with several and their index.

    Raises:
        ConfigurationError: there is no such path, no safetensors file, several without an index, or files are missing or damaged.
    """
    if path.is_file():
        return _in_file(path)
    if not path.is_dir():
        raise ConfigurationError(f"weights={path}: there is no such folder or file")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return _in_index(path, index)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return _in_file(files[0])
    if files:
        raise ConfigurationError(
            f"weights={path}: {len(files)} safetensors files and no {index.name}, which says that they belong together: copy "
            "the index too, or name one file"
        )
    others = sorted(file.name for file in path.iterdir())
    shown = ", ".join(others[:5]) or "nothing"
    raise ConfigurationError(
        f"weights={path}: no safetensors file, but {shown}: save the model with transformers' model.save_pretrained(folder)"
    )


def _in_index(folder: Path, index: Path) -> dict[str, StoredTensor]:
    try:
        places: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"weights={folder}: {index.name} is no index of safetensors files: {error!r}: copy it again"
        ) from error
    names = sorted(set(places.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigurationError(
            f"weights={folder}: {len(missing)} of the {len(names)} files in {index.name} are missing: {_listed(missing)}: copy "
            "them too"
        )
    found = {key: stored for name in names for key, stored in _in_file(folder / name).items()}
    lost = sorted(places.keys() - found.keys())
    if lost:
        raise ConfigurationError(
            f"weights={folder}: {index.name} names tensors that no file has: {_listed(lost)}: copy the files again"
        )
    return found


def _in_file(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            return {name: StoredTensor(file, name, tuple(opened.get_slice(name).get_shape())) for name in names}
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"weights={file}: not a whole safetensors file: {error}: copy it again") from error


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
