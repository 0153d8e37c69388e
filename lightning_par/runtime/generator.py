"""Leaving the global generators of random numbers as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


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
