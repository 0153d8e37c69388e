"""How the hidden state passes through the blocks of a chain, from the calls that a run made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_par.trace.record import Block, Op, Value


class NoChain(Exception):
    """Why the blocks of a container are no chain."""


@dataclass
class BlockCall:
    """One call of a block.

    Attributes:
        path: the block.
        arguments: value numbers of the tensors among its arguments, by position or keyword.
        results: value numbers of the tensors in its output, by key; ``None`` for a bare tensor.
        keys: all keys of the output.
    """

    path: str
    arguments: dict[int | str, int]
    results: dict[Any, int] = field(default_factory=dict)
    keys: tuple[Any, ...] = ()


def output_by_key(output: Any, path: str) -> dict[Any, Any]:
    """A block's output by key: None for a bare tensor, indices of a tuple or list, keys of a dict.

    Raises:
        NoChain: it is something else.
    """
    if isinstance(output, torch.Tensor):
        return {None: output}
    if type(output) in (tuple, list):
        return dict(enumerate(output))
    if type(output) is dict:
        return dict(output)
    raise NoChain(f"{path} returns a {type(output).__name__}, and a block of a chain returns a tensor, a tuple or a dict")


def follow_blocks(calls: Sequence[BlockCall], ops: Sequence[Op], values: Sequence[Value]) -> tuple[Block, ...]:
    """The blocks, with the place where each takes and leaves the hidden state.

    The hidden state is the argument that was computed in the block before or since; for the first block, the argument in
    the same place.

    Raises:
        NoChain: a block takes or leaves none.
    """
    last_read: dict[int, int] = {}  # value -> last phase that reads it
    for op in ops:
        for number in op.inputs:
            last_read[number] = max(last_read.get(number, -1), op.phase)
    for index, call in enumerate(calls):
        for number in call.arguments.values():
            last_read[number] = max(last_read.get(number, -1), 2 * index + 1)
    blocks: list[Block] = []
    for index in reversed(range(len(calls))):
        place = blocks[-1].carry_argument if blocks else None
        blocks.append(_follow(index, calls[index], values, last_read, place))
    return tuple(reversed(blocks))


def _follow(index: int, call: BlockCall, values: Sequence[Value], last_read: dict[int, int], place: int | str | None) -> Block:
    """Args:
    place: where the next block takes its hidden state; None for the last block.
    """
    floats = {where: n for where, n in call.arguments.items() if values[n].is_float}
    arriving = {where: n for where, n in floats.items() if values[n].depends_on_parameters}
    if index > 0:
        arriving = {where: n for where, n in arriving.items() if values[n].phase >= 2 * index - 1}
    elif place in floats:  # also straight from the batch, with no embedding before the blocks
        arriving = {place: floats[place]}
    results = {key: n for key, n in call.results.items() if values[n].depends_on_parameters and values[n].is_float}
    leaving = {key: n for key, n in results.items() if last_read.get(n, -1) > 2 * index + 1} or (results if place is None else {})
    if not arriving or not leaving:
        raise NoChain(f"{call.path} does not {'take the output of the block before' if not arriving else 'pass a hidden state on'}")
    (where, came), *_ = arriving.items()
    (key, left), *others = leaving.items()
    return Block(call.path, where, () if key is None else (key,), call.keys, came, left, tuple(n for _, n in others))
