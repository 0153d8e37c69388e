"""Where a generator is before each draw of a record: as in one process, without drawing what nobody keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy
import torch

from lightning_par.materialize.jump import BLOCK, jump, twister_at
from lightning_par.runtime.generator import generators_put_back

CELL = 1 << 18  # numbers drawn from one seed in `fast`
GROUP = 16  # numbers that torch draws at once
# Bytes of the state of torch's CPU generator (aten/src/ATen/CPUGeneratorImpl.cpp, CPUGeneratorImplStateLegacy): the Mersenne
# twister's 624 words lie in the middle, its position before them.
_LEFT, _NEXT, _WORDS = slice(8, 12), slice(16, 24), slice(24, 24 + 8 * BLOCK)
_FAR = 1 << 23  # numbers that take as long to pass over as a jump over a new distance: 22 ms


def skip(state: torch.Tensor, words: int) -> torch.Tensor:
    """The state of a CPU generator after ``words`` more numbers of 32 bits. 3 ns for each, at most 30 ms."""
    if words == 0:
        return state
    raw = state.numpy().copy()
    left, following = int(raw[_LEFT].view(numpy.int32)[0]), int(raw[_NEXT].view(numpy.uint64)[0])
    key, position = raw[_WORDS].view(numpy.uint64).astype(numpy.uint32), BLOCK if left == 1 else following
    blocks, last = divmod(position + words - 1, BLOCK)
    if words < _FAR:
        twister = twister_at(key, position)
        twister.random_raw(words, output=False)
        key = twister.state["state"]["key"]
    else:
        key = jump(key, blocks)
    raw[_WORDS].view(numpy.uint64)[:] = key
    raw[_LEFT].view(numpy.int32)[0], raw[_NEXT].view(numpy.uint64)[0] = BLOCK - last, last + 1
    return torch.from_numpy(raw)


def words_for(name: str, args: tuple[Any, ...], dtype: torch.dtype, numel: int) -> int | None:
    """Numbers of 32 bits that ``normal_`` or ``uniform_`` takes to fill contiguous memory; None where that is not known.

    ``normal_`` fills 16 elements at once and the last 16 a second time where that does not divide; fewer than 16 it draws
    one by one (aten/src/ATen/native/cpu/DistributionTemplates.h). Held against torch itself, once for each kind of call.
    """
    cost = _cost(name, args, dtype)
    return None if numel < GROUP or cost is None else cost.words(numel)


@dataclass(frozen=True)
class _Cost:
    """Numbers of 32 bits that a fill takes.

    Attributes:
        each: for one element.
        again: elements that are drawn once more where groups leave a rest.
        draws_rest: whether the elements of the rest are drawn before that too: not in half precision.
    """

    each: int
    again: int
    draws_rest: bool

    def words(self, numel: int) -> int:
        rest = numel % GROUP
        return self.each * (numel + (self.again if rest else 0) - (0 if self.draws_rest else rest))


_COSTS = [_Cost(each, *more) for each in (1, 2) for more in ((0, True), (GROUP, True), (GROUP, False))]


@lru_cache
def _cost(name: str, args: tuple[Any, ...], dtype: torch.dtype) -> _Cost | None:
    if name not in ("normal_", "uniform_"):
        return None
    with generators_put_back():
        torch.default_generator.manual_seed(0)
        start, ends = torch.default_generator.get_state(), []
        for numel in (48, 53):
            torch.default_generator.set_state(start)
            getattr(torch.empty(numel, dtype=dtype), name)(*args)
            ends.append((numel, _position(torch.default_generator.get_state())))
    fits = (cost for cost in _COSTS if all(_position(skip(start, cost.words(numel))) == end for numel, end in ends))
    return next(fits, None)


def _position(state: torch.Tensor) -> tuple[int, bytes]:
    raw = state.numpy()
    return int(raw[_NEXT].view(numpy.uint64)[0]), raw[_WORDS].tobytes()


def offset_words(name: str, args: tuple[Any, ...], dtype: torch.dtype, first: int) -> int | None:
    """Numbers of 32 bits before element ``first``, a multiple of 16."""
    cost = _cost(name, args, dtype)
    return None if cost is None else cost.each * first


class Stream:
    """What a fill draws from a state of its generator on, in pieces; where the last one ended the state is known."""

    def __init__(self, state: torch.Tensor, name: str, args: tuple[Any, ...], generator: torch.Generator) -> None:
        self._begin, self._call, self._generator = state, (name, args), generator
        self._element, self._state = 0, state

    def fill(self, out: torch.Tensor, first: int) -> None:
        """Draw element ``first``, a multiple of 16, and the following. Leaves the generator after them."""
        if first < self._element:
            self._element, self._state = 0, self._begin
        name, args = self._call
        words = offset_words(name, args, out.dtype, first - self._element)
        assert words is not None
        self._generator.set_state(skip(self._state, words))
        getattr(out, name)(*args, generator=self._generator)
        self._element, self._state = first + out.numel(), self._generator.get_state()


def piece_end(start: int, last: int, numel: int) -> int:
    """Where a piece ends that begins at ``start``: a multiple of 16, or the end of the tensor.

    The last 16 elements stay in one piece, because torch draws them a second time where 16 does not divide their number.
    """
    end = min(start + CELL - start % CELL, -(-last // GROUP) * GROUP, numel)
    return numel if numel - end < GROUP else end


def in_cells(out: torch.Tensor, first: int, numel: int, seed_of: Callable[[int], int], fill: Callable[[torch.Tensor], Any]) -> None:
    """Elements ``first`` and following of ``numel``, drawn in cells that each have a seed, so that any part can be made alone.

    Args:
        out: contiguous, flat.
        first, numel: which part of how many.
        seed_of: the seed of a cell.
        fill: draws into a flat tensor from torch's default generator.
    """
    done = 0
    while done < out.numel():
        cell, inside = divmod(first + done, CELL)
        size = min(CELL, numel - cell * CELL)
        count = min(size - inside, out.numel() - done)
        torch.default_generator.manual_seed(seed_of(cell))
        if count == size:
            fill(out[done : done + count])
        else:
            whole = torch.empty(size, dtype=out.dtype)
            fill(whole)
            out[done : done + count] = whole[inside : inside + count]
        done += count
