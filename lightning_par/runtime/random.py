"""Random streams: which ranks draw the same numbers and which draw different ones.

All ranks of a tp group start from equal generators and draw equally, so that a dropout mask on a replicated activation
is one mask. On a sharded activation every rank needs its own numbers, or all parts would drop the same places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_par.runtime.axis import Axis
from lightning_par.runtime.generator import torch_generators

_SEED_BOUND = 2**62
_PHILOX_STEP = 4  # a CUDA generator's offset counts in multiples of four


@contextmanager
def sharded_stream(axis: Axis, device: torch.device) -> Iterator[None]:
    """Inside, the default generator of ``device`` draws numbers that differ over ``axis``.

    Afterwards the generator is where it would be after a single draw, whatever was drawn inside: equal on all ranks of
    the axis if it was equal before. The inner seed follows from the outer state alone, so that recomputing a forward
    from a restored state (activation checkpointing) draws the same masks. No communication and no device
    synchronisation. On an axis that plays its ranks in one process there is nothing to tell apart.
    """
    if axis.size == 1 or axis.is_played or device.type == "meta":
        yield
    elif device.type == "cuda":
        with _cuda_stream(axis, device):
            yield
    else:
        seed = int(torch.randint(_SEED_BOUND, (), device="cpu"))
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(mix_seed(seed, axis.coordinate))
        try:
            yield
        finally:
            torch.default_generator.set_state(state)


@contextmanager
def _cuda_stream(axis: Axis, device: torch.device) -> Iterator[None]:
    generator = torch_generators(device)[-1]
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.manual_seed(mix_seed(mix_seed(seed, offset), axis.coordinate))  # mixed twice: no sum of the two may be met again
    try:
        yield
    finally:
        generator.manual_seed(seed)
        generator.set_offset(offset + _PHILOX_STEP)


def mix_seed(seed: int, coordinate: int) -> int:
    """A 63-bit seed for one coordinate: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mask = 2**64 - 1
    z = (seed + (coordinate + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1
