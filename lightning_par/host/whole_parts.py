"""Parts of a batch that are not one for each sample: they go whole to every microbatch, for better or worse.

A mask of all positions belongs there; labels of which one is missing do not. They cannot be told apart by their sizes alone,
so the step itself is asked: it runs dry on a microbatch, and where it fails the parts are named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from lightning_par.errors import ConfigurationError, DataError
from lightning_par.host.batch import split_batch
from lightning_par.plan import Plan
from lightning_par.runtime.nested import children, path_to, tensors_in
from lightning_par.runtime.precision import Precision
from lightning_par.trace import trace_step

_Part = tuple[str, torch.Tensor]


def whole_parts(batch: Any) -> list[_Part]:
    """The tensors of a batch whose dim 0 is not its number of samples, with their paths."""
    samples = _samples(batch)
    return [(path, tensor) for path, tensor in _named(batch, "batch") if tensor.ndim and len(tensor) != samples]


def note_whole_parts(module: Any, batch: Any, plan: Plan, step: str, precision: Precision) -> tuple[str, ...]:
    """A note on what goes whole to every microbatch, once the step has run dry on one. One process.

    Raises:
        DataError: the step, which runs on the whole batch, fails on a microbatch.
    """
    num_microbatches, parts = plan.layout.microbatches or 1, whole_parts(batch)
    if num_microbatches == 1 or not parts:
        return ()
    microbatch, size = split_batch(batch, num_microbatches)[0]
    run = partial(trace_step, module, step=step, keep_error=True, precision=precision)
    error, samples = run(microbatch, batch_size=size).error, _samples(batch)
    if error is not None and run(batch, batch_size=samples).error is None:
        raise DataError(
            f"{step} runs on the whole batch of {samples} samples and fails on a microbatch of {size} "
            f"({_first_line(error)}): {_sizes(parts)}, not the number of samples, and "
            "goes whole to every microbatch: give it one row for each sample, or use one microbatch (mb1)"
        ) from error
    return (f"{_sizes(parts)}, and the batch has {samples} samples: it goes whole to every microbatch",)


def explain_sizes(batch: Any, step: str, error: Exception) -> None:
    """Tell of a step that fails on its whole batch where one field of the batch has another length than all others.

    A size that divides the number of samples, and that of another dim, may be a property of the whole batch, such as a mask.

    Raises:
        DataError: there is such a field; from ``error``.
    """
    if isinstance(error, ConfigurationError) or not isinstance(error, (ValueError, RuntimeError, IndexError)):
        return
    tensors, samples = dict(_named(batch, "batch")), _samples(batch)
    if any(children(field) is not None for _, field in children(batch) or ()):
        return
    others = {size for tensor in tensors.values() for size in tensor.shape[1:]}
    odd = [(path, tensor) for path, tensor in whole_parts(batch) if samples % len(tensor) and len(tensor) not in others]
    if odd:
        alike = ", ".join(path for path, tensor in tensors.items() if tensor.ndim and len(tensor) == samples)
        raise DataError(
            f"{_sizes(odd)}, and {alike} {samples}: all tensors of a batch must have its samples along dim 0, and {step} fails "
            f"({_first_line(error)}): correct the dataset or its collate_fn"
        ) from error


def _samples(batch: Any) -> int:
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim), 0)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _sizes(parts: Sequence[_Part]) -> str:
    return ", ".join(f"{path} has {len(tensor)} rows" for path, tensor in parts[:5])


def _named(node: Any, path: str) -> Iterator[_Part]:
    if isinstance(node, torch.Tensor):
        yield path, node
    for key, child in children(node) or ():
        yield from _named(child, path_to(path, node, key))
