"""Sums of many gradients over an axis in few collectives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_par.runtime.axis import Axis

BUCKET_BYTES = 25 * 2**20  # what PyTorch's DistributedDataParallel uses (bucket_cap_mb)


def sum_gradients(parameters: Sequence[nn.Parameter], shapes: Sequence[tuple[int, ...]], axis: Axis, scale: float = 1.0) -> None:
    """Replace every ``p.grad`` by the sum over the axis of ``scale`` times it. Collective over the axis.

    A gradient missing on some ranks counts as zero there and is filled in; one missing on all stays ``None``, which an
    optimizer skips, as in one process. Half-precision gradients are summed in float32. A gradient is another tensor afterwards.

    Args:
        parameters: the same ones in the same order on every rank of the axis, with or without a gradient.
        shapes: their local shapes; ``p.shape`` is no answer while ZeRO-3 has the parameter partitioned.
        axis: what to sum over; nothing happens on one of size 1.
        scale: factor applied before the sum.
    """
    if axis.size > 1:
        for start, stop in _bounds(parameters, shapes):
            _sum_bucket(parameters[start:stop], shapes[start:stop], axis, scale)


def set_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Set ``parameter.grad``, also where ZeRO-3 has emptied ``parameter.data``: torch refuses a gradient of another shape."""
    data = parameter.data
    if data.shape != gradient.shape:
        parameter.data = gradient
    parameter.grad = gradient
    parameter.data = data


def gradient_dtype(parameter: nn.Parameter) -> torch.dtype:
    """The dtype of ``parameter.grad``."""
    return parameter.grad_dtype or parameter.dtype


def _sum_bucket(parameters: Sequence[nn.Parameter], shapes: Sequence[tuple[int, ...]], axis: Axis, scale: float) -> None:
    """One all-reduce of ``[gradients..., one flag per parameter: how many ranks have it]``."""
    sizes = [_numel(shape) for shape in shapes]
    flat = torch.empty(sum(sizes) + len(sizes), dtype=_sum_dtype(parameters[0]), device=parameters[0].device)
    *parts, flags = flat.split([*sizes, len(sizes)])
    has_gradient = [parameter.grad is not None for parameter in parameters]
    for parameter, part, shape in zip(parameters, parts, shapes, strict=True):
        if parameter.grad is None:
            part.zero_()
        elif parameter.grad.dtype == part.dtype:
            torch.mul(parameter.grad, scale, out=part.view(shape))
        else:  # else it would be rounded before the sum
            part.view(shape).copy_(parameter.grad).mul_(scale)
    flags.copy_(torch.tensor(has_gradient))
    axis.all_reduce(flat)
    # read only where something is missing: it makes the host wait for the device
    is_anywhere = has_gradient if all(has_gradient) else (flags > 0).tolist()
    for parameter, part, shape, is_present in zip(parameters, parts, shapes, is_anywhere, strict=True):
        if is_present:  # the sum itself, where no other dtype is asked for: one pass over memory less
            set_gradient(parameter, part.view(shape).to(gradient_dtype(parameter)))


def _bounds(parameters: Sequence[nn.Parameter], shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """Cut the list into runs of one dtype and device, of at most `BUCKET_BYTES` (or of one parameter)."""
    start, num_bytes = 0, 0
    for i, (parameter, shape) in enumerate(zip(parameters, shapes, strict=True)):
        first, dtype = parameters[start], _sum_dtype(parameter)
        size = _numel(shape) * dtype.itemsize
        if i > start and (num_bytes + size > BUCKET_BYTES or (_sum_dtype(first), first.device) != (dtype, parameter.device)):
            yield start, i
            start, num_bytes = i, 0
        num_bytes += size
    if parameters:
        yield start, len(parameters)


def _sum_dtype(parameter: nn.Parameter) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
