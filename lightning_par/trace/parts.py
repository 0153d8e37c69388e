"""The parts of a running step: a new one begins wherever a block is called and where it is left.

Which containers make the chain is known when the step has run, so that operations are recorded with their part, and get the
phase of it afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TypeVar

from lightning_par.trace.passage import BlockCall
from lightning_par.trace.record import Op, Output, Value


class Parts:
    """Counts parts, and knows the phase of each.

    Attributes:
        current: the number of the part that runs.
    """

    def __init__(self) -> None:
        self.current = 0
        self._borders: list[tuple[str, bool]] = []  # what began parts 1, 2, ...: the call of a block, or its end

    def begin(self, block: str, is_call: bool) -> None:
        """A new part begins with the call of a block, or where it is left."""
        self._borders.append((block, is_call))
        self.current += 1

    def phases(self, blocks: Sequence[str]) -> list[int]:
        """The phase of each part, for a chain of these blocks; see `lightning_par.trace.record`."""
        places = {path: index for index, path in enumerate(blocks)}
        phases = [0]
        for path, is_call in self._borders:
            index = places.get(path)
            phases.append(phases[-1] if index is None else 2 * index + (1 if is_call else 2))
        return phases


_T = TypeVar("_T", Op, Value, Output)


def in_phases(records: Sequence[_T], phases: Sequence[int]) -> list[_T]:
    """Records of a run with the phase where they have their part; those from before the step stay so."""
    return [record if record.phase < 0 else replace(record, phase=phases[record.phase]) for record in records]


def by_phase(counts: Mapping[int, int], phases: Sequence[int], num_phases: int) -> tuple[int, ...]:
    """Sums by phase of what was counted by part."""
    sums = [0] * num_phases
    for part, count in counts.items():
        sums[phases[part]] += count
    return tuple(sums)


def joined(calls: Sequence[BlockCall], main: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The containers whose blocks ran once each, in order, one container after the other; in order of execution.

    Args:
        calls: of blocks of all containers.
        main: the container that is in the chain in any case.
        sizes: number of blocks of the containers that may be in it.
    """
    chosen = [main]
    for container, size in sizes.items():
        if container != main and _runs(calls, container, size, chosen):
            chosen.append(container)
    order = dict.fromkeys(call.container for call in calls)
    return tuple(container for container in order if container in chosen)


def _runs(calls: Sequence[BlockCall], container: str, size: int, beside: Sequence[str]) -> bool:
    """Whether a container's blocks ran once each and in order, not in turns with those of others."""
    if [call.index for call in calls if call.container == container] != list(range(size)):
        return False
    runs = [name for name, _ in groupby(call.container for call in calls if call.container in (container, *beside))]
    return len(runs) == len(set(runs))
