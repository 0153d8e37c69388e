"""Runs a constructor on tensors without memory and records what would fill them.

Tensors that a constructor makes lie on torch's meta device, and say that they are on the CPU while it runs. Small tensors of
known values (zeros, ranges, lists of numbers) are simply made. Where the code reads a value of a tensor without memory, that
value is found by replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode

from lightning_par.materialize.record import Draw, Init, Operation, Place, Record, places_in, record_of
from lightning_par.materialize.replay import replay, state_after
from lightning_par.private.torch import TorchDispatchMode, generator_key, outside_modes, trunc_normal_by, unseen_by_modes
from lightning_par.runtime.nested import map_tensors, tensors_in

_SMALL = 1 << 16  # elements of a tensor of known values that is simply made
_REPLACING = {"normal_", "uniform_", "fill_", "zero_", "copy_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_"}
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_UNREAD = ("_like", "new_")  # an operation of such a name asks a tensor for its shape alone
_META, _CPU = torch.device("meta"), torch.device("cpu")


class Unrecordable(RuntimeError):
    """A constructor did with a tensor without memory what cannot be done again."""


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """Inside, what makes and fills tensors is added to a record. Afterwards generators are where one process has them (`exact`)."""
    recorder = _Recorder(record)
    with trunc_normal_by(recorder.trunc_normal), _AsOnCPU(recorder), recorder:
        yield
    recorder.settle()


def begin_record(init: Init) -> Record:
    """An empty record that starts where torch's default generator is. For ``fast`` one number is drawn."""
    start = torch.default_generator.get_state()
    return Record(init, int(torch.randint(2**62, ())) if init == "fast" else 0, start)


class _Recorder(TorchDispatchMode):
    """Sees every operation below autograd."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self._positions: dict[tuple[int, bytes], Draw] = {}  # after which draw a generator is in a state, see `_draw`
        self._generators: dict[int, torch.Generator] = {}
        self._stand_ins: dict[int, torch.Generator] = {}  # for the user's generators, which no replay may move

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        with unseen_by_modes():
            tensors = tensors_in([args, kwargs])
            is_random = torch.Tag.nondeterministic_seeded in func.tags
            is_deferred = any(tensor.is_meta for tensor in tensors)
            if is_deferred and func is torch.ops.aten._local_scalar_dense.default:
                return self.value(args[0]).item()
            if not is_deferred and not self._makes(func, args, kwargs, tensors, is_random):
                return self._run(func, args, kwargs, is_random)
            if any(not tensor.is_meta for tensor in _written(func, args, kwargs)):
                return self._run(func, args, kwargs, is_random)
            return self._record(func, args, kwargs, tensors, is_random)

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a tensor without memory would hold now."""
        with outside_modes():
            self._check_known(tensor)
            return replay(self.record, Place.of(tensor))

    def settle(self) -> None:
        """Put generators where one process has them; in `fast` nobody asks."""
        for generator in self._generators.values() if self.record.init == "exact" else ():
            self._settle(generator)

    def trunc_normal(
        self, original: Callable[..., torch.Tensor], tensor: torch.Tensor, *args: Any, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """``torch.nn.init.trunc_normal_``: one operation here, because its code asks whether all numbers are within the bounds."""
        with outside_modes():
            is_deferred = record_of(tensor) is self.record
        if not is_deferred:
            return original(tensor, *args, generator=generator)
        with outside_modes():
            place, draw = Place.of(tensor), self._draw(generator or torch.default_generator)
            whole = frozenset([place.key]) if self._covers(place) else frozenset()
            kwargs = {} if generator is None else {"generator": draw.generator}
            function, keys = torch.nn.init.trunc_normal_, frozenset([place.key])
            self.record.add(Operation(draw.index, function, (place, *args), kwargs, (place,), keys - whole, keys, whole, draw))
        return tensor

    def _makes(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor], is_random: bool) -> bool:
        """Whether an operation without deferred inputs makes a tensor that is to be deferred."""
        if not _takes_device(func) or (kwargs.get("device") or _CPU).type != "cpu":
            return False
        if _name(func) in _EMPTY or is_random:
            return True
        if tensors:
            return False
        made: torch.Tensor = func(*args, **{**kwargs, "device": _META})
        return made.numel() > _SMALL

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any], is_random: bool) -> Any:
        """On real values, of deferred tensors too."""
        args, kwargs = map_tensors(lambda each: self.value(each) if each.is_meta else each, (args, kwargs))
        if is_random and self.record.init == "exact":
            self._settle(kwargs.get("generator") or torch.default_generator)
        return func(*args, **kwargs)

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor], is_random: bool) -> Any:
        for tensor in tensors:
            if tensor.is_meta:
                self._check_known(tensor)
        if (kwargs.get("device") or _CPU).type not in ("cpu", "meta"):
            raise Unrecordable(f"{func} makes a tensor on {kwargs['device']}")
        if _name(func) in ("set_", "resize_"):
            raise Unrecordable(f"{func} changes the memory of a tensor")
        args, kwargs = map_tensors(lambda each: each if each.is_meta else each.detach().clone(), (args, kwargs))
        again = map_tensors(lambda each: Place.of(each) if each.is_meta else each, (args, kwargs))
        on_meta = {"device": _META} if _takes_device(func) and (kwargs.get("device") or not tensors) else {}
        bare_args, bare_kwargs = map_tensors(lambda each: each.to(_META), (args, {**kwargs, **on_meta}))
        written = {Place.of(tensor) for tensor in _written(func, args, kwargs)}
        try:
            result = func(*bare_args, **bare_kwargs)
        except Exception:
            if written or is_random:
                raise
            return self._run(func, args, kwargs, is_random)  # its shape depends on values
        outputs = tuple(tensors_in(result))
        made = {Place.of(output).key for output in outputs if self.record.hold(output)}
        if not made and not written:
            return result  # a view
        draw = self._draw(kwargs.get("generator") or torch.default_generator) if is_random else None
        name = _name(func)
        replaced = {place.key for place in written if name in _REPLACING and self._covers(place)} | made
        read = places_in([again[0][1:], again[1]] if name in _REPLACING else again)  # what is replaced is not read
        reads = set() if name.endswith(_UNREAD[0]) or name.startswith(_UNREAD[1]) else {place.key for place in read}
        operation = Operation(
            len(self.record.operations),
            func,
            again[0],
            {**again[1], **({"device": _CPU} if on_meta else {}), **(_generator_of(draw) if kwargs.get("generator") else {})},
            tuple(Place.of(output) for output in outputs),
            frozenset(reads),
            frozenset(made | {place.key for place in written}),
            frozenset(replaced),
            draw,
        )
        self.record.add(operation)
        return result

    def _covers(self, place: Place) -> bool:
        """Whether a place is all of its storage."""
        return place.numel * place.dtype.itemsize == self.record.storages[place.key].nbytes()

    def _check_known(self, tensor: torch.Tensor) -> None:
        if record_of(tensor) is not self.record:
            raise Unrecordable("a tensor on the meta device that was not made here has no values")

    def _draw(self, generator: torch.Generator) -> Draw:
        """Note a draw after all others, and move the generator on by one number, so that a state set by the user is seen as one."""
        if generator.device.type != "cpu":
            raise Unrecordable(f"a generator on {generator.device}")
        state = generator.get_state()
        is_start = self._stand_in(generator) is torch.default_generator and torch.equal(state, self.record.start)
        previous = self._positions.get((generator_key(generator), _bytes(state)), None if is_start else state)
        draw = Draw(self._stand_in(generator), previous, len(self.record.operations))
        torch.empty(1).uniform_(generator=generator)
        self._positions[generator_key(generator), _bytes(generator.get_state())] = draw
        self._generators[generator_key(generator)] = generator
        return draw

    def _stand_in(self, generator: torch.Generator) -> torch.Generator:
        if generator_key(generator) == generator_key(torch.default_generator):
            return torch.default_generator
        return self._stand_ins.setdefault(generator_key(generator), torch.Generator())

    def _settle(self, generator: torch.Generator) -> None:
        draw = self._positions.get((generator_key(generator), _bytes(generator.get_state())))
        if draw is not None:
            generator.set_state(state_after(self.record, draw))


class _AsOnCPU(TorchFunctionMode):
    """Tensors without memory say that they are on the CPU: constructors ask, and would leave out what they do."""

    _ANSWERS: ClassVar[dict[Any, Any]] = {
        torch.Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
        torch.Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
        torch.Tensor.device.__get__: _CPU,
    }

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            if func in self._ANSWERS:
                return self._ANSWERS[func]
            if func is torch.Tensor.tolist:
                return self._recorder.value(args[0]).tolist()
            if func is torch.Tensor.__setitem__ and isinstance(args[2], (bool, int, float)):
                args = (
                    *args[:2],
                    torch.tensor(args[2], dtype=args[0].dtype),
                )  # torch would make it on the meta device, without its value
        return func(*args, **(kwargs or {}))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation changes."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_in(value)
    return found


def _generator_of(draw: Draw | None) -> dict[str, torch.Generator]:
    return {} if draw is None else {"generator": draw.generator}


def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()
