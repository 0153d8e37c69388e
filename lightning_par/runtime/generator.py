"""Leaving the generators of random numbers as they were."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def generators_put_back(others: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """What runs inside draws from the generators of torch (on the CPU), numpy and Python, which afterwards are as before.

    Args:
        others: more generators to put back.
    """
    generators = [torch.default_generator, *others]
    states = [generator.get_state() for generator in generators]
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
