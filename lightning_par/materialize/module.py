"""Modules whose tensors have no memory yet: how they come about, and how their tensors get values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast, get_args

import torch
import torch.distributed as dist
from torch import nn

from lightning_par.errors import ConfigurationError, ModelError, ReplicaError
from lightning_par.materialize.record import Init, Operation, Place, Record, record_of
from lightning_par.materialize.recorder import begin_record, recording
from lightning_par.materialize.replay import replay
from lightning_par.private.torch import TorchDispatchMode, has_gradient_hook, swap_contents
from lightning_par.runtime.axis import GroupAxis
from lightning_par.runtime.nested import tensors_in


@contextmanager
def deferred_init(init: str = "exact") -> Iterator[None]:
    """Modules built inside have no memory for their weights; each rank of a run makes only its shards of them.

    The name and the idea are those of torchdistx. Everything that fills weights belongs inside. Tensors that hold no weights
    may be read: their values are then computed.

    Args:
        init: ``exact``, weights are bit for bit those that one process draws from the same state of torch's generator, which is
            afterwards where it is there; or ``fast``, each weight is drawn from a seed of its own, equal in every layout.

    Raises:
        ConfigurationError: another word.
    """
    if init not in get_args(Init):
        raise ConfigurationError(f"deferred_init({init!r}): there are exact and fast")
    with recording(begin_record(cast(Init, init))):
        yield


def is_deferred(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no memory, but a record of its values."""
    return record_of(tensor) is not None


def records_in(module: nn.Module) -> list[Record]:
    """The records of all deferred parameters and buffers of a module."""
    found = [record_of(tensor) for tensor in (*module.parameters(), *module.buffers())]
    return list(dict.fromkeys(record for record in found if record is not None))


def share_records(module: nn.Module, world: GroupAxis) -> None:
    """Let all ranks draw what rank 0 draws. Collective over ``world``.

    Ranks of a script without a seed began elsewhere, and their constants differ.

    Raises:
        ReplicaError: the constructor did not do the same on all ranks.
    """
    records = records_in(module)
    if world.size == 1:
        return
    box = [[(record.start, record.seed, record.digest()) for record in records]]
    dist.broadcast_object_list(box, src=world.ranks[0], group=world.group)
    if [digest for _, _, digest in box[0]] != [record.digest() for record in records]:
        raise ReplicaError(
            f"the constructor of {type(module).__name__} made other tensors on rank {dist.get_rank()} than on rank 0: seed what it "
            "draws from, as with pl.seed_everything(1)"
        )
    for record, (start, seed, _) in zip(records, box[0], strict=True):
        if not torch.equal(start, record.start):
            record.cache.clear()
            record.passes.clear()
        record.start, record.seed = start, seed
        for constant in record.constants():
            dist.broadcast(constant, src=world.ranks[0], group=world.group)


def shares_record(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two deferred tensors are views of one storage."""
    return is_deferred(tensor) and is_deferred(other) and record_key(tensor) == record_key(other)


@contextmanager
def seeing_deferred(see: Callable[[torch.Tensor, str], None]) -> Iterator[None]:
    """Inside, ``see`` is called with each deferred tensor that an operation reads or changes, and its name; views apart."""
    with _Watch(see):
        yield


class _Watch(TorchDispatchMode):
    def __init__(self, see: Callable[[torch.Tensor, str], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_in([args, kwargs]) if not func.is_view else ():
            if is_deferred(tensor):
                self._see(tensor, func.overloadpacket.__name__)
        return func(*args, **kwargs)


def whole_value(tensor: torch.Tensor) -> torch.Tensor:
    """All values of a deferred tensor."""
    record = record_of(tensor)
    assert record is not None
    return replay(record, Place.of(tensor))


def give_values(tensor: torch.Tensor, values: torch.Tensor, name: str) -> None:
    """Turn a deferred tensor into one with values, in place: whoever holds it, holds that.

    Raises:
        ModelError: a hook on its gradient would be lost.
    """
    if isinstance(tensor, nn.Parameter):
        if has_gradient_hook(tensor):
            raise ModelError(
                f"{name} has a hook on its gradient, and weights that get their memory after the constructor lose it: register "
                "hooks in on_fit_start, or build the module with init=constructor"
            )
        values = nn.Parameter(values, tensor.requires_grad)
    swap_contents(tensor, values)


def defer_values(values: Mapping[torch.Tensor, torch.Tensor]) -> None:
    """Take the memory of tensors away, in place, and give them a record that says to copy their values from others."""
    record = Record("exact", 0, torch.default_generator.get_state())
    for tensor, source in values.items():
        bare = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")
        record.hold(bare)
        place = Place.of(bare)
        keys, clone = frozenset([place.key]), torch.ops.aten.clone.default
        record.add(Operation(len(record.operations), clone, (source,), {}, (place,), frozenset(), keys, keys))
        swap_contents(tensor, nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare)


def materialize_attributes(module: nn.Module) -> None:
    """Give values to deferred tensors that are neither parameters nor buffers: attributes, and those in their lists and dicts.

    Views of parameters stay as they are until these have values.
    """
    registered = {record_key(tensor) for tensor in (*module.parameters(), *module.buffers()) if tensor.is_meta}
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if not name.startswith(("_parameters", "_buffers", "_modules")):
                for tensor in _tensors(value):
                    if is_deferred(tensor) and record_key(tensor) not in registered:
                        give_values(tensor, whole_value(tensor), f"{path}.{name}".lstrip("."))


def materialize_rest(module: nn.Module) -> None:
    """Give values to all parameters, buffers and attributes that are still deferred."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_deferred(tensor):
            give_values(tensor, whole_value(tensor), name)
    materialize_attributes(module)


def record_key(tensor: torch.Tensor) -> int:
    """What tensors on the same storage share."""
    return Place.of(tensor).key


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = list(value.values()) if isinstance(value, dict) else value
    return [each for each in inner if isinstance(each, torch.Tensor)] if isinstance(inner, (list, tuple)) else []
