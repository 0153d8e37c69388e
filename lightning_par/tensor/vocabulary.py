"""Rows of a vocabulary, cut over the tp axis in ranges of one size: which of them a rank holds."""

from __future__ import annotations

import torch


def local_rows(ids: torch.Tensor, rows: int, coordinate: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where ``ids`` are in the range of rows of one coordinate.

    Ids outside the vocabulary are out of range in the result too, so that the lookup that uses it fails as it would on the
    whole vocabulary, without a check (and on a GPU a synchronisation) of our own.

    Args:
        ids: global ids, any shape.
        rows: rows on each coordinate. Where the vocabulary does not divide, the last ones are nobody's.
        coordinate: whose range, ``coordinate * rows`` to ``(coordinate + 1) * rows``.
        vocabulary: rows in all.

    Returns:
        The local index, 0 for rows of other coordinates; and a mask of the ids that are rows of other coordinates.
    """
    outside = (ids < 0) | (ids >= vocabulary)
    index = ids - coordinate * rows
    elsewhere = ((index < 0) | (index >= rows)) & ~outside
    return index.masked_fill(elsewhere, 0).masked_fill(outside, rows), elsewhere
