"""``torch.nn.init.trunc_normal_`` piece by piece, with the numbers that torch draws for the whole tensor.

Torch draws the whole tensor, and draws it whole again for those elements that lie outside the bounds, until none do
(torch/nn/init.py, 2.13). So the element i of pass k is number ``k * numel + i``::

    pass 0   3.1  0.2 -0.4  2.7     bounds -2 and 2: elements 0 and 3 are taken from a later pass
    pass 1   0.9  1.5  0.1 -2.2
    pass 2   0.3 -0.6 -2.1  1.2     the generator stands after this pass
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from lightning_par.materialize.stream import CELL, GROUP, Stream, piece_end, words_for
from lightning_par.runtime.generator import generators_put_back

Bounds = tuple[float, float, float, float]  # mean, standard deviation, lower and upper bound


@dataclass(frozen=True)
class Passes:
    """The states of a generator before each pass, and after the last one."""

    starts: tuple[torch.Tensor, ...]
    end: torch.Tensor

    def streams(self, args: Bounds, generator: torch.Generator) -> list[Stream]:
        """What each pass draws."""
        return [Stream(state, "normal_", args[:2], generator) for state in self.starts]


def find_passes(state: torch.Tensor, args: Bounds, dtype: torch.dtype, numel: int, generator: torch.Generator) -> Passes:
    """Draw until all elements lie within the bounds. Memory: a piece, and 8 bytes for each element that is drawn again.

    Leaves the generator at the end.
    """
    buffer = torch.empty(min(CELL + GROUP, numel), dtype=dtype)
    starts, pending = [state], None
    generator.set_state(state)
    while True:
        rejected, start = [], 0
        while start < numel:
            end = piece_end(start, numel, numel)
            piece = buffer[: end - start].normal_(*args[:2], generator=generator)
            if pending is None:
                rejected.append(_outside(piece, args).nonzero().flatten() + start)
            else:
                first, last = torch.searchsorted(pending, torch.tensor([start, end])).tolist()
                inside = pending[first:last]
                rejected.append(inside[_outside(piece[inside - start], args)])
            start = end
        pending = torch.cat(rejected)
        if not pending.numel():
            return Passes(tuple(starts), generator.get_state())
        starts.append(generator.get_state())


def fill_truncated(out: torch.Tensor, first: int, args: Bounds, passes: Sequence[Stream]) -> None:
    """Fill a piece that begins at element ``first``."""
    passes[0].fill(out, first)
    outside = _outside(out, args)
    for stream in passes[1:]:
        if not outside.any():
            return
        again = torch.empty_like(out)
        stream.fill(again, first)
        torch.where(outside, again, out, out=out)
        outside = _outside(out, args)


def cuts_nothing(args: Bounds) -> bool:
    """Whether the bounds lie further out than any number that torch draws.

    It draws r cos t with r^2 = -2 ln u (Box and Muller); the least u is 2^-53, in double precision, and r then 8.57. Single
    precision may round the mean by a part of 2^24.
    """
    mean, deviation, low, high = args
    reach = 9 * deviation + 2**-20 * abs(mean)
    return low <= mean - reach and mean + reach <= high


@lru_cache
def is_known(args: Bounds, dtype: torch.dtype) -> bool:
    """Whether torch draws as here: it does not in versions before, nor where the bounds leave out most of the numbers."""
    with generators_put_back():
        for numel in (48, 53):
            torch.default_generator.manual_seed(1)
            start, expected = torch.default_generator.get_state(), torch.empty(numel, dtype=dtype)
            torch.nn.init.trunc_normal_(expected, *args)
            end = torch.default_generator.get_state()
            if words_for("normal_", args[:2], dtype, numel) is None:
                return False
            ours, generator = torch.empty(numel, dtype=dtype), torch.Generator()
            passes = _first_passes(start, args, dtype, numel, generator)
            if passes is None:
                return False
            fill_truncated(ours, 0, args, passes.streams(args, generator))
            if not torch.equal(ours, expected) or not torch.equal(passes.end, end):
                return False
    return True


def _first_passes(state: torch.Tensor, args: Bounds, dtype: torch.dtype, numel: int, generator: torch.Generator) -> Passes | None:
    """As `find_passes`; None where too few numbers lie within the bounds to go on drawing."""
    sample = torch.empty(1000, dtype=dtype).normal_(*args[:2], generator=torch.Generator().manual_seed(0))
    return None if _outside(sample, args).sum() > 700 else find_passes(state, args, dtype, numel, generator)


def _outside(values: torch.Tensor, args: Bounds) -> torch.Tensor:
    low, high = (torch.tensor(bound, dtype=values.dtype).item() for bound in args[2:])
    return (values < low) | (values > high)
