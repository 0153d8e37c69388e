"""The index of a checkpoint: which tensors are in it, and of which pieces in which files they are made.

``checkpoint.json`` is all that says what the other files mean::

    {
      "format": "lightning_par", "version": 1, "layout": "tp2_pp2_zero1",
      "tensors": {
        "model.head.weight": {"shape": [65, 64], "dtype": "float32", "kind": "parameter", "aliases": ["model.wte.weight"],
          "values": {
            "weight":  {"dtype": "float32", "pieces": [["rank-00000.safetensors", "weight/model...[0:33,0:64]", [0, 0], [33, 64],
                        "9f7a..."], ...]},
            "exp_avg": ...}}},
      "files": {"rank-00000.safetensors": {"bytes": 123, "checksum": "..."}, ...}
    }

A checksum is XXH3 of 64 bits, of the bytes of a piece or, for small files, of the whole file; it finds damage, not malice. Nothing
that is read here can run code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import xxhash

from lightning_par.checkpoint.box import Box
from lightning_par.errors import CheckpointError

INDEX = "checkpoint.json"
VERSION = 1
PARAMETER, BUFFER = "parameter", "buffer"
EITHER = "either"  # what another program wrote does not say


@dataclass(frozen=True)
class Piece:
    """A box of a tensor in a file.

    Attributes:
        file: its name.
        key: the piece's name in it.
        box: in the global tensor.
        checksum: of its bytes.
    """

    file: str
    key: str
    box: Box
    checksum: str


@dataclass
class Values:
    """One tensor that is kept for a name: the weight, or a state of the optimizer.

    Attributes:
        dtype: of all its pieces.
        pieces: they cover the global shape, once.
    """

    dtype: str
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class Entry:
    """A parameter or buffer.

    Attributes:
        shape: the global shape.
        dtype: in which the module computes with it; values may be more exact.
        kind: `PARAMETER`, `BUFFER` or `EITHER`.
        aliases: the other names that tied parameters have.
        values: by what they are.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: str
    aliases: list[str] = field(default_factory=list)
    values: dict[str, Values] = field(default_factory=dict)


@dataclass
class Index:
    """What is in a checkpoint.

    Attributes:
        layout: the word of the layout that wrote it.
        entries: by the user's own name.
        files: bytes of every other file, and the checksum of those that have no pieces.
    """

    layout: str
    entries: dict[str, Entry] = field(default_factory=dict)
    files: dict[str, tuple[int, str | None]] = field(default_factory=dict)

    def find(self, name: str) -> Entry | None:
        """The tensor of a name, which may be an alias."""
        return self.entries.get(name) or next((entry for entry in self.entries.values() if name in entry.aliases), None)

    def dump(self) -> str:
        """As JSON, with its own checksum."""
        content = {
            "format": "lightning_par",
            "version": VERSION,
            "layout": self.layout,
            "tensors": {name: _entry_to_json(entry) for name, entry in self.entries.items()},
            "files": {name: {"bytes": size, "checksum": checksum} for name, (size, checksum) in self.files.items()},
        }
        return json.dumps({**content, "checksum": _checksum_of(content)})

    def names_in(self, file: str) -> list[str]:
        """Tensors that have a piece in a file."""
        return [
            name
            for name, entry in self.entries.items()
            if any(piece.file == file for values in entry.values.values() for piece in values.pieces)
        ]


def read_index(folder: Path) -> Index:
    """Read and check the index of a checkpoint; the files that it names must be there, whole.

    Raises:
        CheckpointError: it is no checkpoint, or a damaged one.
    """
    path = folder / INDEX
    if not path.is_file():
        found = "there is nothing" if not folder.exists() else "it is a single file" if folder.is_file() else f"it has no {INDEX}"
        raise CheckpointError(f"{folder} is not a checkpoint of this strategy ({found}): give the folder that it wrote")
    try:
        content = json.loads(path.read_bytes())
        known, version = content["format"] == "lightning_par", content["version"]
        checksum = content.pop("checksum")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check the disk and the rights") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: it is no index ({type(error).__name__}: {error}): {_REMEDY}") from None
    if not known or version != VERSION:
        raise CheckpointError(
            f"{path} is of format {content['format']} {version}, and this lightning_par reads {VERSION}: update it"
        )
    if checksum != _checksum_of(content):
        raise CheckpointError(f"{path} is damaged: its checksum does not fit what it says: {_REMEDY}")
    try:
        index = Index(
            content["layout"],
            {name: _entry_from_json(entry) for name, entry in content["tensors"].items()},
            {name: (int(file["bytes"]), file["checksum"]) for name, file in content["files"].items()},
        )
        _check_pieces(index)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}: {_REMEDY}") from None
    _check_files(folder, index)
    return index


_REMEDY = "use another checkpoint"


def _check_pieces(index: Index) -> None:
    for name, entry in index.entries.items():
        whole = Box((0,) * len(entry.shape), entry.shape)
        _check_dtype(name, entry.dtype)
        for what, values in entry.values.items():
            _check_dtype(name, values.dtype)
            for piece in values.pieces:
                inside = not math.prod(piece.box.shape) or (piece.box & whole) == piece.box
                if len(piece.box.shape) != len(entry.shape) or not inside:
                    raise ValueError(f"a piece of {name} ({what}) lies outside of it")
                if piece.file not in index.files:
                    raise ValueError(f"{name} ({what}) is in {piece.file}, which is not listed")
            covered, wanted = sum(box.numel for box in {piece.box for piece in values.pieces}), math.prod(entry.shape)
            if covered != wanted:
                raise ValueError(f"the pieces of {name} ({what}) have {covered} of its {wanted} elements")
    for file in index.files:
        if PurePosixPath(file).name != file or file in ("", ".", ".."):
            raise ValueError(f"{file!r} is no name of a file in it")


def _check_dtype(name: str, dtype: str) -> None:
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"{name} is of {dtype!r}, which is no dtype")


def _check_files(folder: Path, index: Index) -> None:
    for file, (size, checksum) in index.files.items():
        path = folder / file
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            problem = "is missing"
        elif found != size:
            problem = f"is damaged: it has {found} bytes of {size}"
        elif checksum is not None and checksum != checksum_of(path.read_bytes()):
            problem = "is damaged: its checksum does not fit"
        else:
            continue
        raise CheckpointError(f"{path} {problem}{held_in(index, file)}: {_REMEDY}")


def held_in(index: Index, file: str) -> str:
    """Words for the tensors that a file has pieces of."""
    names = index.names_in(file)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"; it holds {', '.join(names[:5])}{more}" if names else ""


def checksum_of(data: Any) -> str:
    """XXH3 of bytes, or of a buffer of them."""
    return xxhash.xxh3_64_hexdigest(data)


def _checksum_of(content: Mapping[str, Any]) -> str:
    return checksum_of(json.dumps(content, sort_keys=True).encode())


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    values = {
        what: {"dtype": each.dtype, "pieces": [[p.file, p.key, *map(list, p.box), p.checksum] for p in each.pieces]}
        for what, each in entry.values.items()
    }
    return {"shape": entry.shape, "dtype": entry.dtype, "kind": entry.kind, "aliases": entry.aliases, "values": values}


def _entry_from_json(entry: Mapping[str, Any]) -> Entry:
    values = {
        what: Values(
            each["dtype"],
            [Piece(file, key, Box(tuple(offset), tuple(shape)), sum_) for file, key, offset, shape, sum_ in each["pieces"]],
        )
        for what, each in entry["values"].items()
    }
    return Entry(tuple(entry["shape"]), entry["dtype"], entry["kind"], list(entry["aliases"]), values)
