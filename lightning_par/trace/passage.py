"""How the hidden state passes through the blocks of a chain, from the calls that a run made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_par.runtime.template import Path, Template
from lightning_par.trace.record import Block, Op, Value


class NoChain(Exception):
    """Why the blocks of a container are no chain."""

    def __init__(self, container: str, reason: str) -> None:
        super().__init__(reason)
        self.container = container


@dataclass
class BlockCall:
    """One call of a block.

    Attributes:
        path: the block.
        container, index: its place among its equals.
        arguments: value numbers of the tensors among its arguments, by path.
        has_gradients: whether it was called with gradients enabled.
        template, results, passed: of its output, see `lightning_par.trace.record.Block`.
    """

    path: str
    container: str
    index: int
    arguments: Mapping[Path, int]
    has_gradients: bool = False
    template: Template = None
    results: Mapping[Path, int] = field(default_factory=dict)
    passed: Mapping[Path, Path] = field(default_factory=dict)


def follow_blocks(
    calls: Sequence[BlockCall], ops: Sequence[Op], values: Sequence[Value], returned: Iterable[int]
) -> tuple[Block, ...]:
    """The blocks, with the place where each takes and leaves the hidden state.

    The hidden state is the argument that was computed in the block before or since; for the first block of a container, the
    argument in the same place as that of the second.

    Args:
        calls: of the chain's blocks, in order.
        ops, values: of the run, with their phases.
        returned: numbers of what the step returned.

    Raises:
        NoChain: a block takes or leaves none.
    """
    last_read = last_reads(calls, ops, returned)
    blocks: list[Block] = []
    for index in reversed(range(len(calls))):
        blocks.append(_follow(index, calls, values, last_read, blocks[-1] if blocks else None))
    return tuple(reversed(blocks))


def last_reads(calls: Sequence[BlockCall], ops: Iterable[Op], returned: Iterable[int]) -> dict[int, int]:
    """The last phase that reads each value."""
    last = dict.fromkeys(returned, 2 * len(calls))
    for op in ops:
        for number in op.inputs:
            last[number] = max(last.get(number, -1), op.phase)
    for index, call in enumerate(calls):
        for number in call.arguments.values():
            last[number] = max(last.get(number, -1), 2 * index + 1)
    return last


def _follow(
    index: int, calls: Sequence[BlockCall], values: Sequence[Value], last_read: Mapping[int, int], following: Block | None
) -> Block:
    """Args:
    following: the next block; None for the last one.
    """
    call = calls[index]
    place = following.carry_argument if following is not None and calls[index + 1].container == call.container else None
    where, came = _arriving(index, call, values, place)
    path, left = _leaving(index, calls, came, values, last_read, following)
    seen = call.arguments, call.template, call.results, call.passed, call.has_gradients
    return Block(call.path, where, path, came, left, *seen)


def _arriving(index: int, call: BlockCall, values: Sequence[Value], place: int | str | None) -> tuple[int | str, int]:
    """Where a block takes the hidden state, and its number; ``place``: where the next block of the container takes it."""
    given = {path[0]: number for path, number in call.arguments.items() if len(path) == 1}
    floats = {where: n for where, n in given.items() if values[n].is_float}
    arriving = {where: n for where, n in floats.items() if values[n].depends_on_parameters}
    if call.index > 0:
        arriving = {where: n for where, n in arriving.items() if values[n].phase >= 2 * index - 1}
    elif place in floats:  # also straight from the batch, with no embedding before the blocks
        arriving = {place: floats[place]}
    elif index == 0 and not arriving:  # such as tokens, for a container that begins with the embedding
        arriving = given
    if not arriving:
        raise NoChain(call.container, f"{call.path} does not take the output of the block before")
    return next(iter(arriving.items()))


def _leaving(
    index: int,
    calls: Sequence[BlockCall],
    came: int,
    values: Sequence[Value],
    last_read: Mapping[int, int],
    following: Block | None,
) -> tuple[Path, int]:
    """Where a block leaves the hidden state, and its number.

    It is what the next block takes as it is; else the result in the place where the block before left what this one took; else
    the first result that later code reads.
    """
    call = calls[index]
    results = {path: n for path, n in call.results.items() if values[n].depends_on_parameters and values[n].is_float}
    read = {path: n for path, n in results.items() if last_read.get(n, -1) > 2 * index + 1}
    leaving = read or (results if following is None else {})
    if not leaving:
        raise NoChain(call.container, f"{call.path} does not pass a hidden state on")
    taken = None if following is None else following.carry_in
    before = {} if index == 0 else calls[index - 1].results
    alike = next((path for path, n in before.items() if n == came), None)
    preferred = [path for path, n in leaving.items() if n == taken] + [path for path in leaving if path == alike]
    path = next(iter(preferred or leaving))
    return path, leaving[path]
