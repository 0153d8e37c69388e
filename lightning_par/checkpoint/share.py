"""What one rank writes of a run: every element of the model states is written by exactly one rank.

Ranks that hold the same piece share it: a large one is cut into equal ranges, a small one goes to one of them. Who shares:

    the ranks of dp        all of it in ZeRO 0; frozen weights in 1 and 2; nothing where it is partitioned
    the ranks of tp        what is not split; of copied heads the first copy writes
    the stages             tied weights
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_par.checkpoint.box import Box, flat_boxes, places
from lightning_par.checkpoint.index import BUFFER, PARAMETER, Entry
from lightning_par.plan import ParameterPlan
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.parameter import ParameterSpec, get_spec
from lightning_par.zero.held import WEIGHT, Held

SMALL_BYTES = 1 << 20  # up to which a piece is not cut for being shared
PIECE_BYTES = 1 << 26  # of the largest piece: what is checked, and so read, as one


@dataclass
class Share:
    """What one rank writes.

    Attributes:
        entries: the tensors that it has pieces of, without values.
        pieces: name of the tensor, which of its values, where in it, the values: live, or a copy.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    pieces: list[tuple[str, str, Box, Tensor]] = field(default_factory=list)


def add_parameters(share: Share, parameters: Iterable[ParameterPlan], held: Iterable[Held], mesh: Mesh) -> None:
    """Add this rank's share of weights and optimizer states.

    Args:
        share: to add to.
        parameters: those of the plan.
        held: what this rank keeps for its parameters.
        mesh: this rank's axes.
    """
    aliases = {each.spec.name: sorted({name for name, _ in each.aliases} - {each.spec.name}) for each in parameters}
    for piece in held:
        spec, dtype = get_spec(piece.parameter), dtype_name(piece.parameter.dtype)
        share.entries.setdefault(spec.name, Entry(spec.shape, dtype, PARAMETER, aliases[spec.name]))
        for start, stop in _ranges(piece, spec, mesh):
            bounds = (piece.start + start, piece.start + stop)
            for place in places(spec.shape, spec.split, mesh.tp.size, mesh.tp.coordinate, *bounds, is_writer=True):
                share.pieces.append((spec.name, piece.key, place.box, place.of(piece.values[start:stop])))


def add_buffer(share: Share, name: str, what: str, buffer: Tensor) -> None:
    """Add a buffer, which is whole."""
    shape = tuple(buffer.shape)
    share.entries.setdefault(name, Entry(shape, dtype_name(buffer.dtype), BUFFER))
    share.pieces.append((name, what, Box((0,) * len(shape), shape), buffer.detach()))


def add_whole(share: Share, name: str, what: str, values: Tensor, kind: str = PARAMETER) -> None:
    """Add all of a tensor, for a process that holds it alone; in pieces of at most `PIECE_BYTES`."""
    shape = tuple(values.shape)
    share.entries.setdefault(name, Entry(shape, dtype_name(values.dtype), kind))
    step = PIECE_BYTES // values.element_size()
    boxes = [box for start in range(0, values.numel(), step) for box in flat_boxes(shape, start, min(start + step, values.numel()))]
    for box in boxes or [Box((0,) * len(shape), shape)]:  # an empty tensor has a piece too, or nobody would know its dtype
        share.pieces.append((name, what, box, box.of(values.detach())))


def weights_of(module: nn.Module) -> Iterator[Held]:
    """The parameters of a module that is not trained: they are whole over dp."""
    for parameter in module.parameters():
        yield Held(parameter, WEIGHT, parameter.detach().reshape(-1), 0, is_shared=True)


def dtype_name(dtype: torch.dtype) -> str:
    """As in ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _ranges(piece: Held, spec: ParameterSpec, mesh: Mesh) -> Iterator[tuple[int, int]]:
    """What of a piece this rank writes, as ranges of at most `PIECE_BYTES`."""
    sharers, own = len(spec.stages), spec.stages.index(mesh.coordinate.pp)
    for axis, is_shared in ((mesh.tp, spec.split is None), (mesh.dp, piece.is_shared)):
        if is_shared:
            sharers, own = sharers * axis.size, own * axis.size + axis.coordinate
    length, itemsize = piece.values.numel(), piece.values.element_size()
    start, stop = 0, length
    if sharers > 1 and length * itemsize <= SMALL_BYTES:
        if zlib.crc32(f"{piece.key}/{spec.name}".encode()) % sharers != own:
            return
    elif sharers > 1:
        part = -(-length // sharers)
        start, stop = min(own * part, length), min((own + 1) * part, length)
    step = PIECE_BYTES // itemsize
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)
