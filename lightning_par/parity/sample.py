"""Small batches of the user's own data: as many samples as the microbatches of all replicas need."""

from __future__ import annotations

import math
from typing import Any

from lightning_par.errors import DataError
from lightning_par.host.batch import batch_size, first_samples, merge_outputs
from lightning_par.host.first_batch import first_batches
from lightning_par.layout import Layout

_OF_A_MICROBATCH = 2  # samples: code that sums over samples or squeezes dims of size 1 does something else with one


def small_batches(loaders: Any, layout: Layout, num_steps: int) -> list[Any]:
    """The batches of all replicas together, one for each step, from the start of the training data.

    Where the data ends before, it begins anew.

    Args:
        loaders: what ``train_dataloader`` gives.
        layout: sizes of the axes; dp and the number of microbatches are known.
        num_steps: batches asked for.

    Raises:
        DataError: there are no batches, they cannot be cut, or they are too small and cannot be put together.
    """
    microbatches, dp = layout.microbatches or 1, layout.dp or 1
    if microbatches == dp == 1:  # nothing is cut in a run, and may be nothing that can be
        return _repeated(first_batches(loaders, num_steps), num_steps)
    size = batch_size(first_batches(loaders, 1)[0])
    replica = microbatches * min(_OF_A_MICROBATCH, size // microbatches) or size  # a batch of fewer has fewer microbatches
    several = math.ceil(replica * dp / size)
    found = first_batches(loaders, several * num_steps)
    groups = [found[start : start + several] for start in range(0, len(found) - several + 1, several)]
    if not groups:
        raise DataError(
            f"the training data has {len(found)} batches of {size}, and {layout} reads {several} of them in a step: give it more"
        )
    return _repeated([first_samples(_joined(group, layout), replica * dp) for group in groups], num_steps)


def _repeated(batches: list[Any], count: int) -> list[Any]:
    return [batches[index % len(batches)] for index in range(count)]


def _joined(batches: list[Any], layout: Layout) -> Any:
    sizes = [batch_size(batch) for batch in batches]
    try:
        return merge_outputs(batches, sizes)
    except DataError as error:
        raise DataError(
            f"{layout} reads {len(batches)} batches of {sizes[0]} in a step, which one process must get as one batch, and they do "
            f"not fit together: check with larger batches, such as data.batch_size={sum(sizes)}"
        ) from error
