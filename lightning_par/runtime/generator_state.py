"""States of random generators, as data that a checkpoint can hold without a pickle."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch

from lightning_par.runtime.generator import generators_put_back, seed_generators

States = dict[str, Any]
_TYPES = (torch.Generator, random.Random, numpy.random.RandomState, numpy.random.Generator)


def generator_states() -> States:
    """The global generators on the CPU: torch's, numpy's and Python's. Inverse: `restore_generators`."""
    return {"torch": torch.get_rng_state(), "numpy": numpy.random.get_state(), "python": random.getstate()}


def restore_generators(states: States) -> None:
    """Have the global generators draw on where `generator_states` was called."""
    torch.set_rng_state(states["torch"])
    numpy.random.set_state(states["numpy"])
    random.setstate(states["python"])


class Stream:
    """Random numbers of one user's own, whatever others draw meanwhile: a place in the sequences of a seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: States | None = None

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """What runs inside draws from it by the global generators on the CPU, which afterwards are as before."""
        with generators_put_back():
            if self._states is None:
                seed_generators(self._seed)
            else:
                restore_generators(self._states)
            yield
            self._states = generator_states()


def draw_seed() -> int:
    """A number from torch's generator; as a DataLoader draws one for its workers."""
    return int(torch.empty((), dtype=torch.int64).random_())


def find_generators(owners: Iterable[object]) -> dict[str, Any]:
    """The generators that objects hold as attributes, such as a sampler made with ``generator=``.

    Returns:
        Each once, by the number and the class of the object that holds it, and the attribute.
    """
    found: dict[int, tuple[str, Any]] = {}
    for number, owner in enumerate(owners):
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, _TYPES):
                found.setdefault(id(value), (f"{number} {type(owner).__name__}.{name}", value))
    return dict(found.values())


def states_of(generators: Mapping[str, Any]) -> States:
    """States of generators by name. Inverse: `restore`."""
    return {name: _state_of(generator) for name, generator in generators.items()}


def restore(generators: Mapping[str, Any], states: States) -> None:
    """Have generators draw on where `states_of` was called; those without a state are left as they are."""
    for name, generator in generators.items():
        if name in states:
            _set_state(generator, states[name])


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, numpy.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
