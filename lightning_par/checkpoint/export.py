"""Checkpoints written for others: whole weights as safetensors, one tensor in memory at a time, and Lightning's own file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lightning_par.checkpoint.load import Checkpoint
from lightning_par.checkpoint.publish import draft_of, open_draft, publish, remove
from lightning_par.checkpoint.shard_file import bytes_of, sync
from lightning_par.checkpoint.whole import Advance, can_read_states, read_weight, read_whole_checkpoint, shown_places
from lightning_par.errors import ConfigurationError

_FORMAT_DTYPES = {  # names of safetensors (github.com/huggingface/safetensors, "Format")
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def write_out(out: Path, write: Callable[[Path], None], is_file: bool = False) -> None:
    """Make a folder or a file that is there whole or not at all.

    Args:
        out: where; nothing may be there.
        write: given an empty folder beside it, fills that; or given the name of a file, writes it.
        is_file: which.

    Raises:
        ConfigurationError: there is something, or it cannot be written.
    """
    if out.exists():
        raise ConfigurationError(f"{out} exists: name another place, or remove it first")
    try:
        open_draft(out)
        if is_file:
            draft_of(out).rmdir()
        try:
            write(draft_of(out))
            publish(out)
        finally:
            remove(draft_of(out))
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written ({error.strerror}): name another place, or free some space") from None


def weight_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Bytes of a parameter or buffer in the dtype of the module."""
    entry = checkpoint.index.entries[name]
    return math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize


def write_safetensors(checkpoint: Checkpoint, folder: Path, max_shard_bytes: int, advance: Advance) -> None:
    """Write whole weights as ``model.safetensors``, or as several files with the index that transformers reads.

    Tied weights stand there once; the metadata says ``{other name: name}``, as safetensors' `save_model` writes it.

    Args:
        checkpoint: whose.
        folder: is there, and empty.
        max_shard_bytes: of the tensors in a file; a larger tensor has a file alone.
        advance: called after each tensor.

    Raises:
        CheckpointError: a piece is damaged.
        ConfigurationError: a dtype has no name in safetensors.
    """
    shards = list(_shards(checkpoint, max_shard_bytes))
    if len(shards) == 1:
        _write_file(checkpoint, shards[0], folder / "model.safetensors", advance)
        return
    places = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(checkpoint, names, folder / file, advance)
        places.update(dict.fromkeys(names, file))
    total = sum(weight_bytes(checkpoint, name) for name in places)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _shards(checkpoint: Checkpoint, max_shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name in checkpoint.index.entries:
        size = weight_bytes(checkpoint, name)
        if names and filled + size > max_shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _write_file(checkpoint: Checkpoint, names: list[str], file: Path, advance: Advance) -> None:
    """The format: bytes of the header as 8 bytes, little endian; the header, as JSON; the tensors, one after the other."""
    header, start, aliases = {}, 0, {"format": "pt"}
    for name in names:
        entry = checkpoint.index.entries[name]
        if entry.dtype not in _FORMAT_DTYPES:
            raise ConfigurationError(f"{name} is {entry.dtype}, which safetensors cannot hold: use --format lightning")
        stop = start + weight_bytes(checkpoint, name)
        header[name] = {"dtype": _FORMAT_DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": [start, stop]}
        start = stop
        aliases.update(dict.fromkeys(entry.aliases, name))
    words = json.dumps({"__metadata__": aliases, **header}).encode()
    words += b" " * (-len(words) % 8)
    with file.open("wb") as opened:
        opened.write(len(words).to_bytes(8, "little") + words)
        for name in names:
            opened.write(bytes_of(read_weight(checkpoint, name)))
            advance(weight_bytes(checkpoint, name))
    sync(file)


def write_lightning(checkpoint: Checkpoint, file: Path, trust: bool) -> list[str]:
    """Write what a Trainer without our strategy would have saved. Memory: all weights and states.

    Args:
        checkpoint: whose.
        file: to write.
        trust: also what is pickled.

    Returns:
        Notes on what is missing.
    """
    run = checkpoint.trainer()["run"]
    content = read_whole_checkpoint(checkpoint.folder, trust=trust, has_states=True)
    torch.save(content, file)
    sync(file)
    notes = []
    if not trust and checkpoint.odd_places():
        notes.append(f"without what only a pickle can hold ({shown_places(checkpoint.odd_places())}): add --trust to have it")
    if "optimizer_states" in content and not can_read_states(run):
        notes.append("without optimizer states: the checkpoint does not say of which parameters they are, or has them of parts")
    return notes
