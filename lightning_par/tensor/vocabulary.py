"""Rows of a vocabulary, cut over the tp axis in equal ranges: which of them a rank holds."""

from __future__ import annotations

import torch


def local_rows(ids: torch.Tensor, rows: int, coordinate: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where ``ids`` are in the range of rows of one coordinate.

    Ids outside the vocabulary stay out of range in the result, so that the lookup that uses it fails as it would on the
    whole vocabulary, without a check (and on a GPU a synchronisation) of our own.

    Args:
        ids: global ids, any shape.
        rows: rows on each coordinate.
        coordinate: whose range, ``coordinate * rows`` to ``(coordinate + 1) * rows``.
        vocabulary: rows in all.

    Returns:
        The local index, 0 for rows of other coordinates; and a mask of the ids that are rows of other coordinates.
    """
    index = ids - coordinate * rows
    elsewhere = (ids >= 0) & (ids < vocabulary) & ((index < 0) | (index >= rows))
    return index.masked_fill(elsewhere, 0), elsewhere
