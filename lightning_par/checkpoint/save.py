"""Saving: what every rank holds, into one folder that is published once, at once or in the background."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_par.checkpoint.box import Box
from lightning_par.checkpoint.index import BUFFER, INDEX, Index, Piece, Values, checksum_of
from lightning_par.checkpoint.plain import Plain
from lightning_par.checkpoint.publish import draft_of, open_draft, publish, remove, together
from lightning_par.checkpoint.shard_file import bytes_of, sync, write_tensors, write_text
from lightning_par.checkpoint.share import Share, dtype_name
from lightning_par.errors import CheckpointError

TRAINER, TRAINER_TENSORS, ODD = "trainer.json", "trainer.safetensors", "pickled.pt"
FILES, FILE_BYTES = 8, 1 << 26  # of one rank: the most files, and the least that is worth one more

_Place = tuple[str, str, Box]  # name of a tensor, which of its values, where in it
_Piece = tuple[str, str, Box, torch.Tensor]  # and the values


@dataclass
class Content:
    """What a save is made of, on one rank.

    Attributes:
        layout: the word of the run's layout.
        share: this rank's part of the tensors.
        trainer: everything else; read on rank 0.
    """

    layout: str
    share: Share
    trainer: Plain


def write_checkpoint(path: Path, content: Content, group: dist.ProcessGroup | None) -> None:
    """Write and publish a checkpoint; one that is there is replaced. Collective over ``group``.

    Args:
        path: the folder.
        content: this rank's part.
        group: all ranks, on the CPU; None for a process alone.

    Raises:
        CheckpointError: on every rank, where one could not write. What was at ``path`` is still there.
    """
    rank = 0 if group is None else dist.get_rank(group)
    failure = f"ckpt {path} could not be written"
    try:
        together(group, failure, lambda: open_draft(path) if rank == 0 else None)
        written = together(group, failure, lambda: _write_share(draft_of(path), content.share, rank))
        together(group, failure, lambda: _complete(path, content, written) if rank == 0 else None)
    except BaseException:
        if rank == 0 and draft_of(path).exists():
            remove(draft_of(path))
        raise


_Written = tuple[dict[str, Any], list[tuple[str, str, str, Piece]], list[tuple[str, int]]]


def _write_share(draft: Path, share: Share, rank: int) -> _Written:
    """One rank's files. Returns what the index says of it."""
    pieces, files = [], []
    with ThreadPoolExecutor(1) as pool:  # the disk is at work on one file while the next one is written
        syncing = []
        for number, group in enumerate(_by_file(share.pieces)):
            file = f"rank-{rank:05d}{f'.{number}' if number else ''}.safetensors"
            tensors = {f"{what}/{name}{_range_words(box)}": values.to("cpu").contiguous() for name, what, box, values in group}
            write_tensors(draft / file, tensors)
            syncing.append(pool.submit(sync, draft / file))
            files.append((file, (draft / file).stat().st_size))
            for (name, what, box, values), (key, written) in zip(group, tensors.items(), strict=True):
                pieces.append((name, what, dtype_name(values.dtype), Piece(file, key, box, checksum_of(bytes_of(written)))))
        for each in syncing:
            each.result()
    return share.entries, pieces, files


def _by_file(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """At most `FILES` groups of about the same size, none of them small but the last."""
    limit = max(FILE_BYTES, -(-sum(values.nbytes for *_, values in pieces) // FILES))
    group: list[_Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += piece[3].nbytes
        if size >= limit:
            yield group
            group, size = [], 0
    if group:
        yield group


def _range_words(box: Box) -> str:
    return f"[{','.join(f'{start}:{start + size}' for start, size in zip(box.offset, box.shape, strict=True))}]"


def _complete(path: Path, content: Content, written: list[_Written]) -> None:
    """Everything else, by rank 0; the index last."""
    draft, index = draft_of(path), Index(content.layout)
    for entries, pieces, files in written:
        for name, entry in entries.items():
            index.entries.setdefault(name, entry)
        for name, what, dtype, piece in pieces:
            index.entries[name].values.setdefault(what, Values(dtype)).pieces.append(piece)
        index.files.update({file: (size, None) for file, size in files})
    write_text(draft / TRAINER, json.dumps(content.trainer.json))
    if content.trainer.tensors:
        write_tensors(draft / TRAINER_TENSORS, content.trainer.tensors)
        sync(draft / TRAINER_TENSORS)
    if content.trainer.odd:
        torch.save(content.trainer.odd, draft / ODD)
        sync(draft / ODD)
    for name in (TRAINER, TRAINER_TENSORS, ODD):
        if (draft / name).exists():
            data = (draft / name).read_bytes()
            index.files[name] = (len(data), checksum_of(data))
    write_text(draft / INDEX, index.dump())
    publish(path)


class Saver:
    """Saves of one run, one after the other. Every rank makes the same calls.

    Args:
        group: all ranks, on the CPU, for nothing else; None for a process alone.
        is_async: whether files are written while training goes on, from a copy in the memory of the host.
    """

    def __init__(self, group: dist.ProcessGroup | None, is_async: bool) -> None:
        self._group, self._is_async = group, is_async
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._staged: dict[_Place, torch.Tensor] = {}
        self._is_staged = threading.Event()
        self._is_staged.set()
        self._lock = threading.Lock()
        self._outdated: list[Path] | None = None  # to be removed after the save in the background; None where there is none

    def save(self, path: Path, content: Content) -> None:
        """Save, or begin to. Collective over all ranks.

        Raises:
            CheckpointError: it, or an earlier one in the background, could not be written.
        """
        self.wait()
        if not self._is_async:
            write_checkpoint(path, content, self._group)
            return
        self._outdated = []
        self._is_staged.clear()
        buffers = [piece for piece in content.share.pieces if content.share.entries[piece[0]].kind == BUFFER]
        copies = {piece[:3]: self._stage(piece) for piece in buffers}  # the next forward may change them
        versions = [values._version for _, _, _, values in content.share.pieces]
        self._thread = threading.Thread(target=self._write, args=(path, content, copies, versions), name="checkpoint-writer")
        self._thread.start()

    def settle(self) -> None:
        """Wait until the weights and optimizer states may be changed. Before each step of an optimizer."""
        self._is_staged.wait()

    def remove(self, path: Path) -> None:
        """Remove a checkpoint, but not before the one is published that is being saved. For one rank."""
        with self._lock:
            if self._outdated is not None:
                self._outdated.append(path)
                return
        remove(path)

    def check(self) -> None:
        """Raise what a save in the background has ended with. No collective: all ranks end one with the same."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in the background.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, path: Path, content: Content, copies: dict[_Place, torch.Tensor], versions: list[int]) -> None:
        try:
            together(self._group, f"{path} could not be written", lambda: self._stage_rest(content.share, copies, versions))
            self._is_staged.set()
            pieces = [(*piece[:3], copies[piece[:3]]) for piece in content.share.pieces]
            write_checkpoint(path, replace(content, share=Share(content.share.entries, pieces)), self._group)
        except BaseException as error:
            self._error = error
        self._is_staged.set()
        with self._lock:
            outdated, self._outdated = self._outdated or [], None
        if self._error is None:
            for each in outdated:
                remove(each)

    def _stage_rest(self, share: Share, copies: dict[_Place, torch.Tensor], versions: list[int]) -> None:
        """Copy what is not copied yet, while forwards and backwards run.

        Raises:
            CheckpointError: something changed weights before the next step of the optimizer.
        """
        for piece, version in zip(share.pieces, versions, strict=True):
            if piece[:3] not in copies:
                copies[piece[:3]] = self._stage(piece)
                if piece[3]._version != version:
                    raise CheckpointError(
                        f"{piece[0]} was changed between the save and the next step of the optimizer, while it was being copied: "
                        "change weights in the step, or use async_save=false"
                    )

    def _stage(self, piece: _Piece) -> torch.Tensor:
        """A copy on the host, in memory that the saves share: a page that is new costs more than what is written to it."""
        place, values = piece[:3], piece[3]
        staged = self._staged.get(place)
        if staged is None or staged.dtype != values.dtype:
            staged = self._staged[place] = torch.empty(values.shape, dtype=values.dtype)
        return staged.copy_(values)
