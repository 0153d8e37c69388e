"""What the code of a step does on every stage of a pipeline, because it runs before the stage's blocks."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_par.plan.crossing import foreign_values
from lightning_par.trace import Trace


def side_effects(trace: Trace, last: int) -> tuple[str, ...]:
    """Notes on code outside of the blocks that later stages run too, once for each microbatch, where it shows.

    That are changes of buffers and of tensors that are attributes of modules, and reads of values of placeholders.

    Args:
        trace: a dry run.
        last: the first block of the last stage.
    """
    return tuple(dict.fromkeys((*_writes(trace, last), *_reads(trace, last))))


def _writes(trace: Trace, last: int) -> Iterator[str]:
    for path, name, phase in trace.writes:
        if _runs_again(phase, last):
            yield (
                f"{path} is changed before the last stage's blocks ({name}): that happens on every later stage, once for each "
                "microbatch; what the change reads of earlier stages are placeholders there"
            )


def _reads(trace: Trace, last: int) -> Iterator[str]:
    foreign = set(foreign_values(trace))
    for number, name, phase in trace.looked_at:
        if number in foreign and _runs_again(phase, last):
            shape = list(trace.values[number].shape)
            yield (
                f"the step reads a value ({name}) of a tensor of shape {shape} made with parameters, before "
                "the last stage's blocks: later stages read it of a placeholder, and go the way that this takes"
            )


def _runs_again(phase: int, last: int) -> bool:
    """Whether code outside of the blocks runs on a later stage than its own."""
    return phase % 2 == 0 and phase <= 2 * last
