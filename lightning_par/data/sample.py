"""What a step gets of tokens: names for a module of one's own, or those of `transformers`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_par.errors import DataError

IGNORED = -100  # what torch's cross_entropy, and transformers, take for no target
FORMATS = ("tokens", "transformers")
Sample = dict[str, torch.Tensor]


def check_format(name: str) -> str:
    """``name``, if there is such a format.

    Raises:
        DataError: there is none.
    """
    if name not in FORMATS:
        raise DataError(f"data.format={name}: there is no such format: use {' or '.join(FORMATS)}")
    return name


def sample_of_window(window: torch.Tensor, name: str) -> Sample:
    """A sample of ``window`` [context + 1].

    Returns:
        ``{"tokens", "targets"}`` [context], targets one token later; as ``transformers`` ``{"input_ids", "labels"}`` [context],
        which are the same: its models move the labels themselves.
    """
    if name == "tokens":
        return {"tokens": window[:-1], "targets": window[1:]}
    return {"input_ids": window[:-1], "labels": window[:-1].clone()}


def sample_of_pieces(pieces: Sequence[torch.Tensor], context: int, filler: int, name: str) -> Sample:
    """A sample of whole documents beside each other, of which none is a target for another.

    Args:
        pieces: their tokens, ``context`` together at most.
        context: tokens of the sample; the rest is filled.
        filler: the token for that. It is a document of its own without targets.
        name: of the format.

    Returns:
        As `sample_of_window`, with `IGNORED` in ``targets`` after the last token of each document (in ``labels`` at its first), and
        ``position_ids``, counted from 0 in each document; models of transformers that are called with ``use_cache=False`` see from
        them where a document begins, and let none attend to another. And, as ``tokens``, ``document_ids``, counted from 0.
    """
    rest = context - sum(map(len, pieces))
    parts = [*pieces, torch.full((rest,), filler)] if rest else list(pieces)
    tokens = torch.cat(parts)
    lengths = torch.tensor([len(part) for part in parts])
    ends = lengths.cumsum(0)
    document_ids = torch.arange(len(parts)).repeat_interleave(lengths)
    position_ids = torch.arange(context) - (ends - lengths)[document_ids]
    filled = torch.arange(context) >= context - rest
    if name == "tokens":
        targets = torch.cat((tokens[1:], tokens[:1]))
        targets[ends - 1] = IGNORED
        targets[filled] = IGNORED
        return {"tokens": tokens, "targets": targets, "position_ids": position_ids, "document_ids": document_ids}
    labels = tokens.masked_fill((position_ids == 0) | filled, IGNORED)
    return {"input_ids": tokens, "labels": labels, "position_ids": position_ids}
