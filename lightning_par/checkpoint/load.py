"""Loading: what a rank of any layout holds, from the pieces that ranks of any other layout wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_par.checkpoint.box import Box, places
from lightning_par.checkpoint.index import BUFFER, PARAMETER, Index, read_index
from lightning_par.checkpoint.numbers import numbers_here
from lightning_par.checkpoint.plain import odd_places, put_together
from lightning_par.checkpoint.publish import find_published
from lightning_par.checkpoint.save import ODD, TRAINER, TRAINER_TENSORS
from lightning_par.checkpoint.shard_file import Shards
from lightning_par.errors import CheckpointError
from lightning_par.runtime.axis import Axis
from lightning_par.runtime.parameter import get_spec
from lightning_par.zero.held import WEIGHT, Held


class Checkpoint:
    """A checkpoint, opened to be read.

    Args:
        path: the folder.

    Raises:
        CheckpointError: there is none, or it is damaged.

    Attributes:
        folder: where it is.
        index: what is in it.
    """

    def __init__(self, path: Path) -> None:
        self.folder = find_published(path)
        self.index: Index = read_index(self.folder)
        self._shards = Shards(self.folder, self.index)

    def trainer(self, trust: bool = False) -> Any:
        """What the save was given beside tensors, as it was.

        Args:
            trust: also what is pickled, which may run any code; else it is left out.
        """
        odd = self._odd() if trust and ODD in self.index.files else None
        try:
            tensors = load_file(self.folder / TRAINER_TENSORS) if TRAINER_TENSORS in self.index.files else {}
            return put_together(self._words(), tensors, odd)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / TRAINER} is damaged: {error!r}: use another checkpoint") from None

    def odd_places(self) -> list[str]:
        """Where the values are in it that `trainer` leaves out, such as ``trainer.callbacks.Mine.state``."""
        return odd_places(self._words()) if ODD in self.index.files else []

    def _words(self) -> Any:
        try:
            return json.loads((self.folder / TRAINER).read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / TRAINER} is damaged: {error!r}: use another checkpoint") from None

    def _odd(self) -> Any:
        try:
            return torch.load(self.folder / ODD, map_location="cpu", weights_only=False)
        except Exception as error:  # unpickling runs code of any kind
            raise CheckpointError(
                f"{self.folder / ODD} cannot be unpickled: {error!r}: import what its classes need, or load without it"
            ) from error

    def read(self, name: str, what: str, box: Box, out: Tensor) -> None:
        """Read a box of a tensor into ``out``.

        Raises:
            CheckpointError: there is no such tensor, or a piece of it is damaged.
        """
        entry = self.index.find(name)
        values = None if entry is None else entry.values.get(what)
        if values is None:
            raise CheckpointError(f"{self.folder} has no {what} of {name}")
        for piece in values.pieces:
            shared = box & piece.box if box.shape else box
            if shared is not None:
                shared.inside(box).of(out).copy_(self._shards.read(name, piece, shared.inside(piece.box)))

    def read_whole(self, name: str, what: str = WEIGHT) -> Tensor:
        """A whole tensor, in the dtype in which it was written."""
        entry = self.index.entries[name]
        whole = torch.empty(entry.shape, dtype=getattr(torch, entry.values[what].dtype))
        self.read(name, what, Box((0,) * len(entry.shape), entry.shape), whole)
        return whole

    def check_fit(self, parameters: Mapping[str, tuple[int, ...]], what: str) -> None:
        """Check that its parameters are those of a module.

        Args:
            parameters: global shapes by name, of all stages.
            what: the module, for the error.

        Raises:
            CheckpointError: names or shapes differ; lists them.
        """
        entries = [({name, *entry.aliases}, entry) for name, entry in self.index.entries.items() if entry.kind != BUFFER]
        saved = {name: entry.shape for names, entry in entries for name in names}
        more = [min(names) for names, entry in entries if entry.kind == PARAMETER and parameters.keys().isdisjoint(names)]
        faults = {
            "missing in the checkpoint": sorted(parameters.keys() - saved.keys()),
            "only in the checkpoint": sorted(more),
            "of another shape": [
                f"{name}: {list(saved[name])} in the checkpoint, {list(shape)} in {what}"
                for name, shape in parameters.items()
                if name in saved and tuple(shape) != saved[name]
            ],
        }
        lines = "".join(f"\n  {fault}: {len(names)}{_listed(names)}" for fault, names in faults.items() if names)
        if lines:
            raise CheckpointError(f"{self.folder} does not fit {what}:{lines}\nBuild the model with which it was trained")


class RankSource:
    """A checkpoint as one rank's source of weights and optimizer states; see `lightning_par.zero.held.Source`.

    Args:
        checkpoint: the checkpoint.
        numbers: what it has of parameters as a whole, by name.
        tp: this rank's axis.
        is_strict: whether every weight must be there; one that is not is left as it is.
    """

    def __init__(self, checkpoint: Checkpoint, numbers: Mapping[str, Mapping[str, Any]], tp: Axis, is_strict: bool = True) -> None:
        self._checkpoint, self._numbers, self._tp, self._is_strict = checkpoint, numbers, tp, is_strict

    def fill(self, held: Held) -> None:
        spec = get_spec(held.parameter)
        if not self._is_strict and self._checkpoint.index.find(spec.name) is None:
            return
        bounds = held.start, held.start + held.values.numel()
        found = list(places(spec.shape, spec.split, self._tp.size, self._tp.coordinate, *bounds))
        if sum(place.box.numel for place in found) < held.values.numel():
            held.values.zero_()  # the padding of the shard
        for place in found:
            self._checkpoint.read(spec.name, held.key, place.box, place.of(held.values))

    def states_of(self, parameter: nn.Parameter) -> Mapping[str, torch.dtype]:
        entry = self._checkpoint.index.find(get_spec(parameter).name)
        values = {} if entry is None else entry.values
        return {what: getattr(torch, each.dtype) for what, each in values.items() if what != WEIGHT}

    def numbers_of(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        return numbers_here(self._numbers, get_spec(parameter), self._tp)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return "".join(f"\n    {name}" for name in names[:20]) + (f"\n    and {len(names) - 20} more" if len(names) > 20 else "")
