"""Batches: cut into microbatches, and the outputs of a step put together again.

The batch size is that of the first tensor. What has it as the size of dim 0 belongs to the samples one by one and is
cut; the rest (a mask of all positions, a temperature) belongs to the batch and goes whole to every microbatch. A thing
of the batch whose dim 0 is equal to the batch size by chance cannot be told from one of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

from lightning_par.errors import DataError
from lightning_par.runtime.nested import arrays_in, children, is_namedtuple, path_to, rebuild


def batch_size(batch: Any) -> int:
    """Samples in a batch: the size of dim 0 of its first tensor that has one, as Lightning counts them.

    Raises:
        DataError: no tensor in the batch has a dim 0.
    """
    size = _find_size(batch)
    if size is None:
        raise DataError(
            f"the batch (a {type(batch).__name__}) holds no tensor with a batch dim, so that it cannot be cut into microbatches: "
            "return tensors with the samples along dim 0 from the dataset or its collate_fn, or use one microbatch (mb1)"
        )
    return size


def split_batch(batch: Any, num_microbatches: int) -> list[tuple[Any, int]]:
    """Cut a batch into microbatches.

    Tensors and numpy arrays whose dim 0 is the batch size are cut along it, into views; lists and tuples of that length
    with no tensor inside (file names, captions) too. Everything else is passed whole. Containers keep their type.

    Args:
        batch: any nesting of mappings, lists, tuples, namedtuples and dataclasses. Lists of tensors are containers, as
            the default collate function returns them; samples must be stacked.
        num_microbatches: pieces asked for.

    Returns:
        (microbatch, samples in it), in order. Sizes differ by at most one, the larger ones first; there are fewer
        pieces than asked for when there are fewer samples. One piece is ``batch`` itself, whatever is in it.

    Raises:
        DataError: several pieces of a batch without a batch dim, or with a ``PackedSequence``.
    """
    if num_microbatches == 1:
        return [(batch, _find_size(batch) or 1)]
    size = batch_size(batch)
    count = max(1, min(num_microbatches, size))
    if count == 1:
        return [(batch, size)]
    sizes = [size // count + (index < size % count) for index in range(count)]
    return list(zip(_split(batch, sizes, "batch"), sizes, strict=True))


def first_samples(batch: Any, count: int) -> Any:
    """The first ``count`` samples of a batch, cut as `split_batch` cuts; all of it where it has no more.

    Raises:
        DataError: a batch without a batch dim, or with a ``PackedSequence``.
    """
    size = batch_size(batch)
    return batch if size <= count else _split(batch, [count, size - count], "batch")[0]


def repeat_samples(batch: Any, count: int) -> Any:
    """A batch of ``count`` samples, those of ``batch`` again and again, of what `split_batch` cuts.

    Raises:
        DataError: a batch without a batch dim.
    """
    size = batch_size(batch)
    return _repeat(batch, size, [index % size for index in range(count)])


def merge_outputs(outputs: Sequence[Any], sizes: Sequence[int], weights: Sequence[float] | None = None) -> Any:
    """The output that a step would have returned for the whole batch, from those it returned for its microbatches.

    With one microbatch, the output itself. Otherwise, place by place in the nested output:

    - a tensor or numpy array whose dim 0 is the microbatch's size: concatenated along dim 0; so is one whose dim 0 is the same
      multiple of the size in all (several sequences for each sample), but not where sizes and values are all equal;
    - a floating 0-dim tensor or a float (a mean loss): averaged, weighted;
    - a list of the microbatch's size, one item for each sample: concatenated, unless every tensor inside has that size
      as dim 0 in all microbatches, which makes it a container; a tuple likewise, but it is a container when any tensor is
      inside. Of microbatches of one sample each, ``[tensor]`` with one row is taken for a container;
    - a container: merged item by item, keeping its type and keys;
    - anything else, ``None`` included: kept if it is the same for all microbatches.

    Args:
        outputs: one for each microbatch, in order.
        sizes: samples in each microbatch.
        weights: how much the means of each count; by default ``sizes``. What counts nothing is left out of a mean.

    Raises:
        DataError: none of the rules applies; names the place.
    """
    if len(outputs) == 1:
        return outputs[0]
    return _merge(list(outputs), sizes, sizes if weights is None or not sum(weights) else weights, "output")


def _find_size(batch: Any) -> int | None:
    sizes = (tensor.shape[0] for tensor in arrays_in(batch) if isinstance(tensor, torch.Tensor) and tensor.ndim)
    return next(sizes, None)


def _split(node: Any, sizes: list[int], path: str) -> list[Any]:
    """The piece of ``node`` for each microbatch."""
    if isinstance(node, PackedSequence):
        raise DataError(
            f"{path} is a PackedSequence, which cannot be cut into microbatches: pack it in the training_step, or use mb1"
        )
    if _is_cut(node, sum(sizes)):
        return [node[start:stop] for start, stop in pairwise(accumulate(sizes, initial=0))]
    items = children(node)
    if items is None:
        return [node] * len(sizes)
    pieces = [_split(child, sizes, path_to(path, node, key)) for key, child in items]
    return [rebuild(node, [piece[index] for piece in pieces]) for index in range(len(sizes))]


def _repeat(node: Any, size: int, rows: list[int]) -> Any:
    if _is_cut(node, size):
        return node[rows] if isinstance(node, (torch.Tensor, np.ndarray)) else type(node)(node[row] for row in rows)
    items = children(node)
    return node if items is None else rebuild(node, [_repeat(child, size, rows) for _, child in items])


def _is_cut(node: Any, size: int) -> bool:
    """Whether ``node`` has one item along its first dim for each of ``size`` samples."""
    if isinstance(node, (torch.Tensor, np.ndarray)):
        return node.ndim > 0 and node.shape[0] == size
    is_sequence = isinstance(node, (list, tuple)) and not is_namedtuple(node)
    return is_sequence and len(node) == size and next(arrays_in(node), None) is None


def _merge(parts: list[Any], sizes: Sequence[int], weights: Sequence[float], path: str) -> Any:
    first = parts[0]
    if all(_is_number(part) for part in parts) and any(isinstance(part, float) for part in parts):
        return sum(part * weight for part, weight in zip(parts, weights, strict=True) if weight) / sum(weights)
    if any(type(part) is not type(first) for part in parts):
        raise _not_merged(path, "is " + " and ".join(sorted({type(part).__name__ for part in parts})))
    if _are_per_sample(parts, sizes):
        return _concatenate(parts, path)
    if isinstance(first, torch.Tensor) and first.is_floating_point() and all(part.ndim == 0 for part in parts):
        weighted = [part.double() * (weight / sum(weights)) for part, weight in zip(parts, weights, strict=True) if weight]
        return torch.stack(weighted).sum().to(first.dtype)
    if children(first) is not None:
        return _merge_containers(parts, sizes, weights, path)
    is_equal = all(_equal(part, first) for part in parts)
    if _is_multiple(parts, sizes) and not (is_equal and len(set(sizes)) == 1):
        return _concatenate(parts, path)
    if is_equal:
        return first
    raise _not_merged(path, f"({type(first).__name__}) is neither one value for each sample nor a floating mean, and differs")


def _merge_containers(parts: list[Any], sizes: Sequence[int], weights: Sequence[float], path: str) -> Any:
    items = [children(part) or [] for part in parts]
    keys = [[key for key, _ in item] for item in items]
    if any(other != keys[0] for other in keys):
        raise _not_merged(path, "has other keys or another length in every microbatch")
    columns = [[item[index][1] for item in items] for index in range(len(keys[0]))]
    merged = [_merge(column, sizes, weights, path_to(path, parts[0], key)) for key, column in zip(keys[0], columns, strict=True)]
    return rebuild(parts[0], merged)


def _are_per_sample(parts: list[Any], sizes: Sequence[int]) -> bool:
    """Whether the parts of an output, of one type, have one item for each of their microbatches' samples."""
    pairs = list(zip(parts, sizes, strict=True))
    if all(isinstance(part, list) and len(part) == size for part, size in pairs):
        inside = [_is_cut(tensor, size) for part, size in pairs for tensor in arrays_in(part)]
        return not inside or not all(inside)
    return all(_is_cut(part, size) for part, size in pairs)


def _is_multiple(parts: list[Any], sizes: Sequence[int]) -> bool:
    """Whether all parts have the same number of rows for each sample."""
    if not isinstance(parts[0], (torch.Tensor, np.ndarray)) or any(part.ndim == 0 for part in parts):
        return False
    return len({len(part) / size for part, size in zip(parts, sizes, strict=True)}) == 1 and len(parts[0]) % sizes[0] == 0


def _concatenate(parts: list[Any], path: str) -> Any:
    first = parts[0]
    if not isinstance(first, (torch.Tensor, np.ndarray)):
        return type(first)(item for part in parts for item in part)
    if any(part.shape[1:] != first.shape[1:] for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise _not_merged(path, f"has shapes {shapes}, which do not fit along dim 0,")
    return torch.cat(parts) if isinstance(first, torch.Tensor) else np.concatenate(parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one is other or bool(one == other)


def _not_merged(path: str, what: str) -> DataError:
    return DataError(
        f"{path} of the step {what} between the microbatches, so that there is no output of the whole batch: "
        "return tensors with the samples along dim 0, means, or None from the step, or use one microbatch (mb1)"
    )
