"""Where a generator is before each draw of a record: as in one process, without drawing what nobody keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy
import torch

from lightning_par.runtime.generator import generators_put_back

CELL = 1 << 18  # numbers drawn from one seed in `fast`
GROUP = 16  # numbers that torch draws at once
# Bytes of the state of torch's CPU generator (aten/src/ATen/CPUGeneratorImpl.cpp, CPUGeneratorImplStateLegacy): the Mersenne
# twister's 624 words lie in the middle, its position before them.
_LEFT, _NEXT, _WORDS = slice(8, 12), slice(16, 24), slice(24, 24 + 8 * 624)


def skip(state: torch.Tensor, words: int) -> torch.Tensor:
    """The state of a CPU generator after ``words`` more numbers of 32 bits. About 3 ns for each."""
    if words == 0:
        return state
    raw = state.numpy().copy()
    left, following = int(raw[_LEFT].view(numpy.int32)[0]), int(raw[_NEXT].view(numpy.uint64)[0])
    twister: Any = numpy.random.MT19937(0)
    key, position = raw[_WORDS].view(numpy.uint64).astype(numpy.uint32), 624 if left == 1 else following
    twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": position}}
    twister.random_raw(words, output=False)
    inner = twister.state["state"]
    raw[_WORDS].view(numpy.uint64)[:] = inner["key"]
    raw[_LEFT].view(numpy.int32)[0], raw[_NEXT].view(numpy.uint64)[0] = 625 - inner["pos"], inner["pos"]
    return torch.from_numpy(raw)


def words_for(name: str, args: tuple[Any, ...], dtype: torch.dtype, numel: int) -> int | None:
    """Numbers of 32 bits that ``normal_`` or ``uniform_`` takes to fill contiguous memory; None where that is not known.

    ``normal_`` fills 16 elements at once and the last 16 a second time where that does not divide; fewer than 16 it draws
    one by one (aten/src/ATen/native/cpu/DistributionTemplates.h). Held against torch itself, once for each kind of call.
    """
    if numel < GROUP:
        return None
    each = _words_each(name, args, dtype)
    return None if each is None else _count(name, each, numel)


@lru_cache
def _words_each(name: str, args: tuple[Any, ...], dtype: torch.dtype) -> int | None:
    if name not in ("normal_", "uniform_"):
        return None
    with generators_put_back():
        torch.default_generator.manual_seed(0)
        start, ends = torch.default_generator.get_state(), []
        for numel in (48, 53):
            torch.default_generator.set_state(start)
            getattr(torch.empty(numel, dtype=dtype), name)(*args)
            ends.append((numel, _position(torch.default_generator.get_state())))
    for each in (1, 2):
        if all(_position(skip(start, _count(name, each, numel))) == end for numel, end in ends):
            return each
    return None


def _count(name: str, each: int, numel: int) -> int:
    return each * (numel + (16 if name == "normal_" and numel % 16 else 0))


def _position(state: torch.Tensor) -> tuple[int, bytes]:
    raw = state.numpy()
    return int(raw[_NEXT].view(numpy.uint64)[0]), raw[_WORDS].tobytes()


def offset_words(name: str, args: tuple[Any, ...], dtype: torch.dtype, first: int) -> int | None:
    """Numbers of 32 bits before element ``first``, a multiple of 16."""
    each = _words_each(name, args, dtype)
    return None if each is None else each * first


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
