"""Texts to a folder of tokens, by many processes, and again from where it was stopped.

What a shard is made of follows from the files and their sizes alone, so that the folder has the same bytes however many processes
write it. A shard is not made again where its part of the index is there, says that it was made of the same, and has its checksums.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lightning_par.data.inputs import Part, cut, documents, find_files
from lightning_par.data.token_folder import ENDS, INDEX, Index, Shard, dtype_for, publish, read_shard, write_index, write_json
from lightning_par.data.tokenizer import Tokenizer, open_tokenizer
from lightning_par.data.workers import run_all
from lightning_par.errors import DataError

PART_BYTES = 64 << 20  # of text in a shard; so much is done again after a stop, by each process
_BATCH_CHARACTERS = 1 << 20  # of texts that are encoded at once
Advance = Callable[[int], None]  # is told bytes of input that are done


@dataclass(frozen=True)
class Job:
    """What is to be done; plain data, for other processes.

    Attributes:
        output: the folder.
        parts: of the files, by shard.
        tokenizer, end_of_document: as `open_tokenizer` takes them.
        column: what holds the text in lines and tables.
    """

    output: str
    parts: tuple[tuple[Part, ...], ...]
    tokenizer: str | None
    end_of_document: str | None
    column: str

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @property
    def num_bytes(self) -> int:
        """Of all inputs."""
        return sum(part.size for part in chain.from_iterable(self.parts))


def plan_job(
    inputs: Sequence[str],
    output: str,
    tokenizer: str | None = None,
    end_of_document: str | None = None,
    column: str = "text",
    part_bytes: int = PART_BYTES,
) -> Job:
    """What is to be done.

    Args:
        inputs: files, folders and patterns, as `find_files` takes them.
        output: the folder of tokens.
        tokenizer, end_of_document: as `open_tokenizer` takes them.
        column: what holds the text in lines and tables.
        part_bytes: of input in a shard.

    Raises:
        DataError: there are no such files.
    """
    return Job(output, tuple(cut(find_files(inputs), part_bytes)), tokenizer, end_of_document, column)


def tokenize(job: Job, processes: int, advance: Advance = lambda size: None) -> Index:
    """Write what is missing of a folder of tokens.

    Args:
        job: what is to be done.
        processes: how many work at it; with 1 it is this one.
        advance: is told the bytes of input that are done, as they are.

    Returns:
        The index of the folder.

    Raises:
        DataError: inputs or tokenizer cannot be read, or have no text, or the folder holds tokens of another tokenizer.
        ProcessError: a process died.
    """
    tokenizer = open_tokenizer(job.tokenizer, job.end_of_document)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        _check_same(job.folder, tokenizer)
        shards = dict(_kept(job, tokenizer, advance))
        missing = [number for number in range(len(job.parts)) if number not in shards]
        if missing:
            (job.folder / INDEX).unlink(missing_ok=True)  # until they are there
        shards.update(run_all(_write, job, missing, processes, advance))
        index = _index_of(tokenizer, [shards[number] for number in range(len(job.parts))])
        if not sum(shard.tokens for shard in index.shards):
            raise DataError("the inputs have no text: nothing is written")
        write_index(job.folder, index)
        _remove_others(job.folder, index)
    except OSError as error:
        raise DataError(f"{error.filename or job.output}: {error.strerror}: nothing is lost, mend it and run again") from error
    return index


def write_shard(job: Job, number: int, tokenizer: Tokenizer, advance: Advance) -> Shard:
    """Write one shard, and then its part of the index."""
    name, dtype = _name(number), dtype_for(tokenizer.vocabulary)
    drafts = {suffix: job.folder / f"{name}.{suffix}.part" for suffix in ("bin", "end")}
    digests = {suffix: xxhash.xxh3_128() for suffix in drafts}
    counts = dict.fromkeys(drafts, 0)
    with ExitStack() as stack:
        files = {suffix: stack.enter_context(draft.open("wb")) for suffix, draft in drafts.items()}
        for texts in _batches(job, number, advance):
            tokens, lengths = _encode(tokenizer, texts, dtype)
            ends = counts["bin"] + np.cumsum(lengths, dtype=ENDS)
            for suffix, numbers in (("bin", tokens), ("end", ends.astype(ENDS))):
                content = numbers.tobytes()
                files[suffix].write(content)
                digests[suffix].update(content)
                counts[suffix] += len(numbers)
    for suffix, draft in drafts.items():
        publish(draft, job.folder / f"{name}.{suffix}")
    checksums = {f"{suffix}_xxh3": digest.hexdigest() for suffix, digest in digests.items()}
    shard = Shard(name, counts["bin"], counts["end"], **checksums, made_of=_made_of(job, number, tokenizer))
    write_json(job.folder / f"{name}.json", asdict(shard))
    return shard


def _write(job: Job) -> Callable[[int, Advance], Shard]:
    """What a process does with the number of a shard."""
    tokenizer = open_tokenizer(job.tokenizer, job.end_of_document)
    return lambda number, advance: write_shard(job, number, tokenizer, advance)


def _batches(job: Job, number: int, advance: Advance) -> Iterator[list[str]]:
    """The documents of a shard, some at once; a part counts as done when its last ones are asked for no more."""
    for part in job.parts[number]:
        texts: list[str] = []
        characters = told = 0
        for text in documents(part, job.column):
            if not text:
                continue
            texts.append(text)
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                yield texts
                done = min(characters, part.size - told)  # characters for bytes: near enough for a bar
                advance(done)
                texts, characters, told = [], 0, told + done
        if texts:
            yield texts
        advance(part.size - told)


def _encode(tokenizer: Tokenizer, texts: list[str], dtype: np.dtype[Any]) -> tuple[np.ndarray, list[int]]:
    """Tokens of documents one after another, and how many each has, with the one at its end."""
    after = np.array([] if tokenizer.end_of_document is None else [tokenizer.end_of_document], dtype)
    encoded = tokenizer.encode(texts)
    pieces = [piece for tokens in encoded for piece in (tokens, after)]
    return np.concatenate(pieces, dtype=dtype, casting="unsafe"), [len(tokens) + len(after) for tokens in encoded]


def _made_of(job: Job, number: int, tokenizer: Tokenizer) -> str:
    made = [tokenizer.name, tokenizer.checksum, tokenizer.end_of_document, job.column, [asdict(part) for part in job.parts[number]]]
    return xxhash.xxh3_128(json.dumps(made).encode()).hexdigest()


def _kept(job: Job, tokenizer: Tokenizer, advance: Advance) -> Iterator[tuple[int, Shard]]:
    """The shards that need not be made again."""
    for number in range(len(job.parts)):
        shard = read_shard(job.folder, _name(number))
        if shard is None or shard.made_of != _made_of(job, number, tokenizer):
            continue
        if shard.is_whole(job.folder, dtype_for(tokenizer.vocabulary)):
            advance(sum(part.size for part in job.parts[number]))
            yield number, shard


def _index_of(tokenizer: Tokenizer, shards: Sequence[Shard]) -> Index:
    return Index(tokenizer.vocabulary, tokenizer.end_of_document, tokenizer.name, tokenizer.checksum, tuple(shards))


def _check_same(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse to write over the tokens of another tokenizer."""
    try:
        there = json.loads((folder / INDEX).read_text())
        name, checksum = there["tokenizer"], there["tokenizer_xxh3"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # nothing that could be read
    if checksum != tokenizer.checksum:
        raise DataError(
            f"--output {folder} holds tokens of {name}, which is not the tokenizer {tokenizer.name} of this call: name another one"
        )


def _remove_others(folder: Path, index: Index) -> None:
    """Remove the shards of an earlier call with more inputs."""
    names = {shard.name for shard in index.shards}
    for file in (*folder.glob("[0-9]*.bin"), *folder.glob("[0-9]*.end"), *folder.glob("[0-9]*.json")):
        if file.stem not in names:
            file.unlink()


def _name(number: int) -> str:
    return f"{number:05d}"
