"""What crosses from stage to stage beside the hidden state, and where a stage finds the object of each value.

A stage runs the user's code from its beginning: what depends on parameters of an earlier stage is garbage there, and so is what
blocks of earlier stages gave. Whatever of that is read later has to arrive from the stage before, in the place of the garbage:
in the very tensor object that the user's code holds, so that every reader sees it. Such an object is found where the code shows
it before the stage begins: among the arguments of the stage's first block, or in what a module returned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

from lightning_par.errors import ModelError
from lightning_par.layout import Layout
from lightning_par.plan.nearest import use_instead
from lightning_par.plan.plan import CarriedPlan
from lightning_par.plan.stream import hidden_values
from lightning_par.runtime.template import find_type, types_in
from lightning_par.trace import Op, Trace

_RULE = "and between pipeline stages a tensor travels that is an argument of a stage's first block, or that a module returned"


def plan_boundaries(trace: Trace, layout: Layout, firsts: Sequence[int]) -> tuple[tuple[CarriedPlan, ...], ...]:
    """For each stage but the first, what it receives beside the hidden state.

    A value that is made on one stage and read several stages later is received by all between.

    Args:
        trace: a dry run with a chain of blocks.
        layout: as the user typed it, for messages.
        firsts: the first block of each stage.

    Raises:
        ModelError: a value that has to travel cannot be found, or is changed in place after it has travelled, or is cut along the
            sequence, or is logged too early; or a block returns a type that no other process knows.
    """
    if len(firsts) < 2:
        return ()
    _check_types(trace, layout, firsts[-1])
    _check_logs(trace, layout, firsts[-1])
    crossing = _Crossing(trace, layout)
    return tuple(crossing.into(first) for first in firsts[1:])


class _Crossing:
    """Knows who makes and who reads each value of a step."""

    def __init__(self, trace: Trace, layout: Layout) -> None:
        self._trace, self._layout = trace, layout
        self._last_read = _last_reads(trace)
        self._stream = hidden_values(trace) if layout.sp else frozenset[int]()
        self._foreign = [
            number for number in foreign_values(trace) if self._last_read.get(number, -1) > trace.values[number].phase >= 0
        ]

    def into(self, first: int) -> tuple[CarriedPlan, ...]:
        """What the stage that begins with block ``first`` receives beside the hidden state."""
        trace, begin = self._trace, 2 * first + 1
        needed: dict[int, int] = {}  # object -> its version
        for number in self._foreign:
            if trace.values[number].phase < begin <= self._last_read[number] and not self._is_hidden_only(number, first):
                needed[trace.objects[number]] = number
        self._check_writes(needed, begin)
        found = (self._found(number, first) for number in needed.values())
        return tuple(carried for carried in found if carried is not None)

    def _is_hidden_only(self, number: int, first: int) -> bool:
        """Whether a value is the stage's hidden state, and read nowhere but in its first block."""
        block = self._trace.blocks[first]
        places = [path for path, given in block.arguments.items() if given == number]
        return number == block.carry_in and len(places) == 1 and self._last_read[number] == 2 * first + 1

    def _found(self, number: int, first: int) -> CarriedPlan | None:
        """Where the value is found; None for what every rank keeps of its own blocks (a cache), in a step that runs them again."""
        trace, block, this = self._trace, self._trace.blocks[first], self._trace.objects[number]
        if number in self._stream:
            self._refuse_sequence(number, first)
        has_gradient = trace.values[number].is_float and trace.values[number].depends_on_parameters
        for path, given in block.arguments.items():
            if trace.objects[given] == this:
                return CarriedPlan(block.path, "argument", path, has_gradient)
        for output in trace.outputs.get(this, ()):
            if output.phase <= 2 * first:
                return CarriedPlan(output.module, "output", output.path, has_gradient)
        if trace.again:
            return None
        self._refuse(number, first)

    # ------------------------------------------------------------------ refusals

    def _refuse(self, number: int, first: int) -> NoReturn:
        trace, reader, made = self._trace, self._reader(number, first), self._maker(number)
        shape, instead = list(trace.values[number].shape), use_instead(self._layout, _has_no_pipeline)
        if made is None:
            raise ModelError(
                f"parallel={self._layout}: {reader} reads a tensor of shape {shape} that requires a gradient, is no parameter of "
                f"the module and was made by nothing that the dry run shows, {_RULE}: register it as an nn.Parameter of the "
                f"modules that read it, or pass it to the blocks, or {instead}"
            )
        raise ModelError(
            f"parallel={self._layout}: {reader} reads a tensor of shape {shape} that {made} made before "
            f"{trace.blocks[first].path}, {_RULE}: make it in a module of its own that the step calls once and that returns it, or "
            f"pass it to the blocks, or {instead}"
        )

    def _refuse_sequence(self, number: int, first: int) -> NoReturn:
        value = self._trace.values[number]
        raise ModelError(
            f"parallel={self._layout}: {self._reader(number, first)} reads a tensor of shape {list(value.shape)} that was computed "
            f"from the samples before {self._trace.blocks[first].path}, and under sp only the hidden state of the blocks travels "
            f"between stages: use parallel={replace(self._layout, sp=False)}"
        )

    def _check_writes(self, needed: Mapping[int, int], begin: int) -> None:
        """Refuse a change in place of what has travelled: in the one process it is seen where a view of it is read."""
        trace = self._trace
        memories = Counter(trace.memories[number] for number in needed.values())
        for op in trace.ops:
            if not op.writes or op.phase < begin:
                continue
            memory = trace.memories[op.outputs[0]] if op.outputs else -1
            written = next((number for number in needed.values() if trace.memories[number] == memory), None)
            if written is not None and (memories[memory] > 1 or trace.values[written].depends_on_parameters):
                raise ModelError(
                    f"parallel={self._layout}: {_place(op)} changes a tensor of shape {list(trace.values[written].shape)} in place "
                    f"that {self._maker(written) or 'the step'} made on an earlier stage: write it without changing that tensor, "
                    f"or {use_instead(self._layout, _has_no_pipeline)}"
                )

    def _reader(self, number: int, first: int) -> str:
        reads = (op for op in self._trace.readers.get(number, ()) if op.phase > 2 * first)
        return next((_place(op) for op in reads), f"{self._trace.step}, which returns it,")

    def _maker(self, number: int) -> str | None:
        """The operation; None where the dry run shows none."""
        return next((_place(op) for op in self._trace.ops if number in op.outputs), None)


def _last_reads(trace: Trace) -> dict[int, int]:
    """The last phase that reads each value. An argument of a block is read by it, even where only its output shows it."""
    last = dict.fromkeys(trace.returned, 2 * trace.num_blocks)
    for number, phase in trace.logged:
        last[number] = max(last.get(number, -1), phase)
    for op in trace.ops:
        for number in op.inputs:
            last[number] = max(last.get(number, -1), op.phase)
    for index, block in enumerate(trace.blocks):
        last[block.carry_in] = max(last.get(block.carry_in, -1), 2 * index + 1)
    return last


def foreign_values(trace: Trace) -> Iterator[int]:
    """The values that only the stage which runs their code can make: of parameters, or made in a block, or made of such."""
    made_of: set[int] = set()
    for op in trace.ops:
        if _is_in_block(op.phase) or not made_of.isdisjoint(op.inputs):
            made_of.update(op.outputs)
    for number, value in enumerate(trace.values):
        if value.depends_on_parameters or number in made_of or _is_in_block(value.phase):
            yield number


def _is_in_block(phase: int) -> bool:
    return phase > 0 and phase % 2 == 1


def _check_types(trace: Trace, layout: Layout, num_passed: int) -> None:
    """Blocks that a stage passes over give an output of the same type, which must be found by its name."""
    for block in trace.blocks[:num_passed]:
        for name in types_in(block.template):
            try:
                find_type(name)
            except (ImportError, AttributeError):
                kind = name.rpartition(":")[2]
                raise ModelError(
                    f"parallel={layout}: {block.path} returns a {kind}, which a pipeline stage that does not run this block "
                    f"has to build: define {kind.rpartition('.')[2]} at the top level of its file, or "
                    f"{use_instead(layout, _has_no_pipeline)}"
                ) from None


def _check_logs(trace: Trace, layout: Layout, last: int) -> None:
    """What counts is what the last stage logs, and until its first block it has placeholders; ``last``: that block."""
    foreign = set(foreign_values(trace))
    early = next((number for number, phase in trace.logged if number in foreign and phase <= 2 * last), None)
    if early is not None:
        raise ModelError(
            f"parallel={layout}: {trace.step} logs a tensor of shape {list(trace.values[early].shape)} that was computed with "
            f"parameters before {trace.blocks[last].path}, and what the last stage logs counts, which has placeholders until then: "
            f"log it after the blocks, or {use_instead(layout, _has_no_pipeline)}"
        )


def _has_no_pipeline(layout: Layout) -> bool:
    return layout.pp == 1


def _place(op: Op) -> str:
    return f"{op.module or 'the step'} ({op.name})"
