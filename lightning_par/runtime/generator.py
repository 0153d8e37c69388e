"""The global generators of random numbers: left as they were, and made equal on all ranks of a replica."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
import torch.distributed as dist

from lightning_par.runtime.axis import GroupAxis


@contextmanager
def generators_put_back() -> Iterator[None]:
    """What runs inside draws from the generators of torch (on the CPU), numpy and Python, which afterwards are as before."""
    torch_state = torch.get_rng_state()
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def share_generators(replica: GroupAxis) -> None:
    """Give all ranks of a replica the state of its first one. Collective over ``replica``.

    Ranks of a script without a seed would else shuffle and augment their common data each in its own way.
    """
    if replica.size == 1:
        return
    states = [(torch.get_rng_state(), random.getstate(), numpy.random.get_state())]
    dist.broadcast_object_list(states, src=replica.ranks[0], group=replica.group)
    torch_state, python_state, numpy_state = states[0]
    torch.set_rng_state(torch_state)
    random.setstate(python_state)
    numpy.random.set_state(numpy_state)
