"""Samples of a folder of tokens, read where they are asked for: nothing but what a sample needs is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_par.data.packing import best_fit
from lightning_par.data.sample import Sample, sample_of_pieces, sample_of_window
from lightning_par.data.token_folder import ENDS, read_index


class TokenFiles:
    """The numbers of a folder, mapped into memory; a copy in another process maps them itself.

    Args:
        folder: as `token_folder` describes it.

    Raises:
        DataError: it is no such folder, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, read_index(folder)
        self._maps: dict[int, np.ndarray] = {}

    def read(self, shard: int, start: int, stop: int) -> torch.Tensor:
        """Tokens of a shard as int64 [stop - start]."""
        if shard not in self._maps:
            path = self.folder / f"{self.index.shards[shard].name}.bin"
            self._maps[shard] = np.memmap(path, self.index.dtype, mode="r")
        return torch.from_numpy(self._maps[shard][start:stop].astype(np.int64))

    def ends(self, shard: int) -> np.ndarray:
        """Where each document of a shard ends, int64 [documents]."""
        return np.fromfile(self.folder / f"{self.index.shards[shard].name}.end", ENDS).astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


class Windows(Dataset[Sample]):
    """Documents one after another, cut every ``context`` tokens, without regard to where they end: no token is left out but a
    last window of each shard that would not be full.

    Args:
        tokens: of a folder.
        context: tokens of a sample; a window has the next one, too, and so shares it with the next window.
        format: of samples.
    """

    def __init__(self, tokens: TokenFiles, context: int, format: str) -> None:
        self.tokens, self.context, self.format = tokens, context, format
        counts = [max(0, shard.tokens - 1) // context for shard in tokens.index.shards]
        self.starts = np.cumsum([0, *counts])  # number of the first window of each shard

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Sample:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        start = (index - int(self.starts[shard])) * self.context
        return sample_of_window(self.tokens.read(shard, start, start + self.context + 1), self.format)


class Documents(Dataset[Sample]):
    """Whole documents beside each other, fitted into samples so that little is left over; one that is longer than ``context`` is
    cut every ``context`` tokens.

    Args:
        tokens: of a folder.
        context: tokens of a sample.
        format: of samples.
        begin, end: documents, counted over all shards.
    """

    def __init__(self, tokens: TokenFiles, context: int, format: str, begin: int, end: int) -> None:
        self.tokens, self.context, self.format = tokens, context, format
        pieces = pieces_of(tokens, context, begin, end)  # [pieces, 3]
        bins = best_fit(pieces[:, 2], context)
        self.pieces = pieces[np.argsort(bins, kind="stable")]
        self.starts = np.concatenate(([0], np.bincount(bins).cumsum()))  # number of the first piece of each sample
        self.filler = tokens.index.end_of_document or 0

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Sample:
        rows = self.pieces[self.starts[index] : self.starts[index + 1]].tolist()
        pieces = [self.tokens.read(shard, start, start + length) for shard, start, length in rows]
        return sample_of_pieces(pieces, self.context, self.filler, self.format)


def pieces_of(tokens: TokenFiles, context: int, begin: int, end: int) -> np.ndarray:
    """The pieces of documents ``begin`` to ``end``: shard, first token and length of each, int64 [pieces, 3]."""
    found, before = [], 0
    for shard in range(len(tokens.index.shards)):
        ends = tokens.ends(shard)
        starts = np.concatenate(([0], ends[:-1]))
        chosen = slice(max(0, begin - before), max(0, end - before))
        starts, ends, before = starts[chosen], ends[chosen], before + len(ends)
        counts = -(-(ends - starts) // context)
        numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its document
        begins = np.repeat(starts, counts) + numbers * context
        lengths = np.minimum(np.repeat(ends, counts) - begins, context)
        found.append(np.stack((np.full_like(begins, shard), begins, lengths), axis=1))
    return np.concatenate(found)


def documents_at_end(tokens: TokenFiles, num_tokens: int) -> int:
    """How many documents at the end of a folder have at least so many tokens together; all, where they have fewer."""
    lengths = np.concatenate([np.diff(tokens.ends(shard), prepend=0) for shard in range(len(tokens.index.shards))])
    return int(np.searchsorted(np.cumsum(lengths[::-1]), num_tokens)) + 1
