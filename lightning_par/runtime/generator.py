"""The global generators of random numbers: left as they were, and made equal on all ranks of a replica."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy
import torch
import torch.distributed as dist

from lightning_par.runtime.axis import GroupAxis

_CPU = torch.device("cpu")


@contextmanager
def generators_put_back(device: torch.device = _CPU) -> Iterator[None]:
    """What runs inside draws from the `torch_generators`, numpy's and Python's, which afterwards are as before."""
    put_back = _remember(torch_generators(device))
    try:
        yield
    finally:
        put_back()


@contextmanager
def generators_put_back_on_error() -> Iterator[None]:
    """Where what runs inside raises, torch's generator on the CPU, numpy's and Python's are afterwards as before."""
    put_back = _remember([torch.default_generator])
    try:
        yield
    except BaseException:
        put_back()
        raise


def _remember(generators: list[torch.Generator]) -> Callable[[], None]:
    torch_states = [generator.get_state() for generator in generators]
    python_state, numpy_state = random.getstate(), numpy.random.get_state()

    def put_back() -> None:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        for generator, state in zip(generators, torch_states, strict=True):
            generator.set_state(state)

    return put_back


def seed_generators(seed: int, device: torch.device = _CPU) -> None:
    """Seed the `torch_generators`, numpy's and Python's."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # it takes no more
    for generator in torch_generators(device):
        generator.manual_seed(seed)


def torch_generators(device: torch.device) -> list[torch.Generator]:
    """The default generators of torch, on the CPU and, where it is another, on ``device``."""
    if device.type != "cuda":
        return [torch.default_generator]
    return [
        torch.default_generator,
        torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index],
    ]


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
