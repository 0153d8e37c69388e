"""A checkpoint as one process reads it that has the whole module: what Lightning's own file would hold.

Weights have the dtype in which the module computes, as in a file of Lightning: of a ``bf16-true`` run they are bfloat16, rounded
from the float32 masters as the run itself rounds them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_par.checkpoint.load import Checkpoint
from lightning_par.checkpoint.publish import earlier_of
from lightning_par.runtime.nested import map_tensors
from lightning_par.zero.held import WEIGHT

Advance = Callable[[int], None]  # told how many bytes of weights were read


def is_folder(path: Any) -> bool:
    """Whether something that Lightning is told to load is a folder, which its own reader cannot open."""
    if not isinstance(path, (str, Path)):
        return False
    # os.path, unlike Path, takes addresses of any length
    is_lost = not os.path.exists(path) and bool(Path(path).name)  # its place is empty while it is being replaced
    return os.path.isdir(path) or (is_lost and os.path.isdir(earlier_of(Path(path))))


def read_whole_checkpoint(path: Path, map_location: Any = None, trust: bool = False, has_states: bool = False) -> dict[str, Any]:
    """Read everything. Memory: all of the weights, and of the states if asked for.

    Args:
        path: the folder.
        map_location: as in `torch.load`; by default on the CPU.
        trust: also what is pickled, which may run any code.
        has_states: with ``optimizer_states`` in the form of `torch.optim.Optimizer.state_dict`, where it can be found out which
            parameters each optimizer has.

    Raises:
        CheckpointError: it is no checkpoint, or a damaged one.
    """
    checkpoint = Checkpoint(path)
    saved = checkpoint.trainer(trust)
    trainer, run = dict(saved["trainer"]), saved["run"]
    device = _device_of(map_location)
    trainer["state_dict"] = {}
    for name, entry in checkpoint.index.entries.items():
        weight = read_weight(checkpoint, name).to(device)
        trainer["state_dict"].update(dict.fromkeys((name, *entry.aliases), weight))
    if has_states and can_read_states(run):
        trainer["optimizer_states"] = map_tensors(lambda state: state.to(device), read_optimizer_states(checkpoint, run))
    return trainer


def load_folder(path: Path, map_location: Any, trust: bool, has_states: bool) -> dict[str, Any]:
    """`read_whole_checkpoint` for Lightning: says what is left out for want of trust."""
    inner = () if has_states else ("trainer.callbacks", "trainer.loops")  # which are read with the states
    odd = [] if trust else [place for place in Checkpoint(path).odd_places() if not place.startswith(inner)]
    if odd:
        rank_zero_warn(
            f"{path} has values that only a pickle can hold, and they are left out: {shown_places(odd)}. Reading them may run any "
            "code: pass weights_only=False if you trust the checkpoint"
        )
    return read_whole_checkpoint(path, map_location, trust, has_states)


def shown_places(odd: Sequence[str]) -> str:
    """The first of `Checkpoint.odd_places`, as Lightning's own dict names them."""
    return ", ".join(place.removeprefix("trainer.") for place in odd[:5])


def read_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """A whole parameter or buffer, in the dtype that it has in the module.

    Raises:
        CheckpointError: a piece of it is damaged.
    """
    entry = checkpoint.index.entries[name]
    dtype = getattr(torch, entry.dtype)
    if math.prod(entry.shape) == 0:  # of which no rank has a piece
        return torch.empty(entry.shape, dtype=dtype)
    return checkpoint.read_whole(name).to(dtype)


def can_read_states(run: Mapping[str, Any]) -> bool:
    """Whether a run's part of a checkpoint says which parameters its optimizers have, and no state belongs to a part of one."""
    numbers = run.get("numbers", {})
    return "groups" in run and "members" in run and not any("@" in key for values in numbers.values() for key in values)


def read_optimizer_states(checkpoint: Checkpoint, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `torch.optim.Optimizer.state_dict` of each optimizer would give in one process.

    Args:
        checkpoint: whose.
        run: its part of the run, of which `can_read_states`.
    """
    return [
        _optimizer_state(checkpoint, run, index, groups, members)
        for index, (groups, members) in enumerate(zip(run["groups"], run["members"], strict=True))
    ]


def _optimizer_state(
    checkpoint: Checkpoint, run: Mapping[str, Any], index: int, groups: list[dict[str, Any]], members: list[list[str]]
) -> dict[str, Any]:
    places, state, written = count(), {}, []
    for group, names in zip(groups, members, strict=True):
        indices = [next(places) for _ in names]
        written.append({**group, "params": indices})
        for place, name in zip(indices, names, strict=True):
            found = dict(_states_of(checkpoint, run, index, name))
            if found:
                state[place] = found
    return {"state": state, "param_groups": written}


def _states_of(checkpoint: Checkpoint, run: Mapping[str, Any], index: int, name: str) -> Iterator[tuple[str, Any]]:
    """The states of a parameter in the optimizer at a position; from the second on the keys begin with it, as in ``1:exp_avg``."""
    keys = [*checkpoint.index.entries[name].values, *run.get("numbers", {}).get(name, {})]
    for key in keys:
        position, _, plain = key.rpartition(":")
        if key != WEIGHT and int(position or 0) == index:
            numbers = run["numbers"].get(name, {})
            yield plain, numbers[key] if key in numbers else checkpoint.read_whole(name, key)


def _device_of(map_location: Any) -> torch.device:
    """Where `torch.load` would put a tensor that is saved on the CPU."""
    if isinstance(map_location, Mapping):
        map_location = map_location.get("cpu")
    if map_location is None or isinstance(map_location, (str, torch.device)):
        return torch.device(map_location or "cpu")
    moved = map_location(torch.UntypedStorage(0), "cpu")
    return torch.device("cpu") if moved is None else moved.device
