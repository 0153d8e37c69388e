"""A folder of tokens: raw numbers, and a JSON file that says what they are. Nothing in it can run code.

index.json     what the numbers are, and of each shard how many, and its checksums; there once all shards are
00000.bin      tokens of a shard, one after another: little-endian uint16, or uint32 where the vocabulary is above 65536
00000.end      where each of its documents ends, in tokens from the start of the shard: little-endian uint64
00000.json     its part of the index, written when both are whole
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lightning_par.errors import DataError

FORMAT = "lightning_par tokens 1"
INDEX = "index.json"
ENDS = np.dtype("<u8")
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Shard:
    """One file of tokens.

    Attributes:
        name: of its files, without the suffix.
        tokens: how many.
        documents: how many.
        bin_xxh3, end_xxh3: checksums of its two files (xxh3, 128 bits).
        made_of: a checksum of what it was made of and how.
    """

    name: str
    tokens: int
    documents: int
    bin_xxh3: str
    end_xxh3: str
    made_of: str

    def sizes(self, dtype: np.dtype[Any]) -> dict[str, int]:
        """Bytes of its files, by suffix."""
        return {"bin": self.tokens * dtype.itemsize, "end": self.documents * ENDS.itemsize}

    def has_sizes(self, folder: Path, dtype: np.dtype[Any]) -> bool:
        """Whether its files are there and as long as they were."""
        files = {suffix: folder / f"{self.name}.{suffix}" for suffix in ("bin", "end")}
        return all(file.is_file() and file.stat().st_size == self.sizes(dtype)[suffix] for suffix, file in files.items())

    def is_whole(self, folder: Path, dtype: np.dtype[Any]) -> bool:
        """Whether its files are byte for byte what was written; reads them."""
        found = (checksum_of(folder / f"{self.name}.{suffix}") for suffix in ("bin", "end"))
        return self.has_sizes(folder, dtype) and (self.bin_xxh3, self.end_xxh3) == tuple(found)


@dataclass(frozen=True)
class Index:
    """What a folder holds.

    Attributes:
        vocabulary: every token is below it.
        end_of_document: the token after each document; None where there is none.
        tokenizer: the name of its file, or ``bytes``.
        tokenizer_xxh3: the checksum of that file; empty for bytes.
        shards: in order.
    """

    vocabulary: int
    end_of_document: int | None
    tokenizer: str
    tokenizer_xxh3: str
    shards: tuple[Shard, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the tokens in the files."""
        return dtype_for(self.vocabulary)


def dtype_for(vocabulary: int) -> np.dtype[Any]:
    """The smaller of the two dtypes of token files that holds every token."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


def write_index(folder: Path, index: Index) -> None:
    """Publish a folder whose shards are all there."""
    content = asdict(index)
    shards = content.pop("shards")
    write_json(folder / INDEX, {"format": FORMAT, "dtype": index.dtype.name, **content, "shards": shards})


def read_index(folder: Path) -> Index:
    """The index of a folder, whose files have the sizes that it says.

    Raises:
        DataError: there is none, or it is no such index, or files are missing or of another size.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise DataError(
            f"{folder} is no folder of tokens ({INDEX}: {error.strerror}): make one with `lightning-par tokenize TEXT --output "
            f"{folder}`"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): run `lightning-par tokenize` again as before") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise DataError(f"{path} does not say {FORMAT!r}, so something else wrote it: make one with `lightning-par tokenize`")
    try:
        dtype = content.pop("dtype")
        index = Index(**{**content, "shards": tuple(Shard(**shard) for shard in content["shards"])})
        is_known = dtype == index.dtype.name
        damaged = [shard.name for shard in index.shards if not shard.has_sizes(folder, index.dtype)]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}): run `lightning-par tokenize` again as before") from None
    if not is_known:
        raise DataError(f"{path} is damaged (dtype {dtype!r}): run `lightning-par tokenize` again as before")
    if damaged:
        raise DataError(
            f"{folder}: the files of shards {', '.join(damaged)} are missing or not as long as {INDEX} says: "
            "run `lightning-par tokenize` again as before, and they are made anew"
        )
    return index


def read_shard(folder: Path, name: str) -> Shard | None:
    """The part of the index that a whole shard has beside it; None where there is none that can be read."""
    try:
        return Shard(**json.loads((folder / f"{name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a file that is there whole or not at all."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    publish(draft, path)


def publish(draft: Path, path: Path) -> None:
    """Put a file that is written in its place, once it is on the disk."""
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
    draft.replace(path)


def checksum_of(path: Path) -> str:
    """Of a file's bytes; empty where it cannot be read."""
    digest = xxhash.xxh3_128()
    try:
        for block in _blocks(path):
            digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            yield block
