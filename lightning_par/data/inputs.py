"""What texts are read: files, the parts that they are cut into, and the documents in each part."""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_par.data.extra import need
from lightning_par.errors import DataError

LINES, ZIPPED_LINES, PARQUET, TEXT = ".jsonl", ".jsonl.gz", ".parquet", ".txt"


@dataclass(frozen=True)
class Part:
    """A part of a file that one process reads.

    Attributes:
        path: of the file.
        kind: how it is read; `TEXT` for every suffix that is no other.
        begin, end: of the lines that begin in these bytes, or of the row groups; the whole file otherwise.
        size: bytes, for the progress.
        stamp: size and time of the last change of the file, in bytes and nanoseconds.
    """

    path: str
    kind: str
    begin: int
    end: int
    size: int
    stamp: tuple[int, int]


def find_files(inputs: Sequence[str]) -> list[Path]:
    """The files that are meant: files, what folders hold (by suffix), what patterns match; sorted within each.

    Raises:
        DataError: there is no such file, or none in a folder.
    """
    found: list[Path] = []
    for word in inputs:
        path = Path(word)
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.is_file() and _kind_of(file, of_folder=True)]
        else:
            files = [path] if path.is_file() else [file for file in map(Path, glob.glob(word, recursive=True)) if file.is_file()]
        if not files:
            listed = ", ".join((TEXT, LINES, ZIPPED_LINES, PARQUET))
            raise DataError(
                f"{word}: no such file, and a folder must have files with {listed}: for others write a pattern, as '{word}/**/*.md'"
            )
        found += sorted(files)
    return list(dict.fromkeys(found))


def cut(files: Iterable[Path], part_bytes: int) -> list[tuple[Part, ...]]:
    """The parts of all files in order, put together to groups of about ``part_bytes``: what a shard of tokens is made of."""
    groups: list[tuple[Part, ...]] = []
    group: list[Part] = []
    size = 0
    for file in files:
        for part in _parts(file, part_bytes):
            group.append(part)
            size += part.size
            if size >= part_bytes:
                groups.append(tuple(group))
                group, size = [], 0
    return groups + ([tuple(group)] if group else [])


def documents(part: Part, column: str) -> Iterator[str]:
    """The documents of a part.

    Args:
        part: of a file. One of text is one document.
        column: what holds the text in lines and tables.

    Raises:
        DataError: a line or a table cannot be read, or has no such column.
    """
    if part.kind == TEXT:
        yield Path(part.path).read_bytes().decode(errors="replace")
    elif part.kind == PARQUET:
        yield from _rows(part, column)
    else:
        yield from _lines(part, column)


def _kind_of(file: Path, of_folder: bool = False) -> str | None:
    for kind in (ZIPPED_LINES, LINES, PARQUET, TEXT):
        if file.name.endswith(kind):
            return kind
    return None if of_folder else TEXT


def _parts(file: Path, part_bytes: int) -> Iterator[Part]:
    kind, status = _kind_of(file), file.stat()
    assert kind is not None
    size, stamp = status.st_size, (status.st_size, status.st_mtime_ns)
    if kind == LINES:
        for begin in range(0, size, part_bytes):
            end = min(begin + part_bytes, size)
            yield Part(str(file), kind, begin, end, end - begin, stamp)
    elif kind == PARQUET:
        metadata = _open_table(str(file)).metadata
        for group in range(metadata.num_row_groups):
            yield Part(str(file), kind, group, group + 1, metadata.row_group(group).total_byte_size, stamp)
    else:
        yield Part(str(file), kind, 0, size, size, stamp)


def _lines(part: Part, column: str) -> Iterator[str]:
    with gzip.open(part.path) if part.kind == ZIPPED_LINES else open(part.path, "rb") as file:
        if part.begin:
            file.seek(part.begin - 1)
            file.readline()  # the rest of a line that begins before
        while (place := file.tell()) < part.end or part.kind == ZIPPED_LINES:
            try:
                line = file.readline()
            except (OSError, EOFError) as error:
                raise DataError(f"{part.path} is no whole gzip file ({error}): get it again, or leave it out") from None
            if not line:
                return
            if line.strip():
                yield _text_of(line, f"{part.path}, the line at byte {place}", column)


def _text_of(line: bytes, where: str, column: str) -> str:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}): each line must be an object with a text") from None
    found = content.get(column) if isinstance(content, dict) else None
    if not isinstance(found, str):
        held = f"it has {', '.join(content)}" if isinstance(content, dict) else f"it is a {type(content).__name__}"
        raise DataError(f"{where}: there is no text {column!r}, {held}: name the one to read with --column NAME")
    return found


def _rows(part: Part, column: str) -> Iterator[str]:
    table = _open_table(part.path)
    if column not in table.schema_arrow.names:
        raise DataError(
            f"{part.path}: there is no column {column!r}, it has {', '.join(table.schema_arrow.names)}: name the one to read with "
            "--column NAME"
        )
    for batch in table.iter_batches(row_groups=range(part.begin, part.end), columns=[column]):
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str | None):
                raise DataError(f"{part.path}: column {column!r} has a {type(text).__name__}, no text: name one with --column NAME")
            yield text or ""


def _open_table(path: str) -> Any:
    parquet = need("pyarrow.parquet", path)
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are these
        raise DataError(f"{path} is no parquet file ({error}): get it again, or leave it out") from None
