"""The recorder: sees every torch function of a running step and writes the graph."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_par.private.torch import (
    backward_call,
    custom_function,
    has_backward_hook,
    is_fake,
    place_of,
    storage_key,
    unseen_by_modes,
)
from lightning_par.runtime.nested import tensors_in, tokens_of
from lightning_par.runtime.template import tensors_by_path
from lightning_par.trace.attention import AttentionFlops
from lightning_par.trace.calls import Calls
from lightning_par.trace.chain import Containers
from lightning_par.trace.description import layer_kind, parameters_of, plain_arguments, state_of
from lightning_par.trace.numbering import Numbering, value_of
from lightning_par.trace.parts import by_phase, in_phases
from lightning_par.trace.record import Layer, LayerKind, Op, Output, Trace, Value

_READS_VALUE = {"item": 1.0, "__float__": 1.0, "__int__": 1, "__index__": 1, "__bool__": False}  # what the dry run assumes
_LEAVES_TORCH = {*_READS_VALUE, "tolist", "numpy", "__array__", "__complex__", "is_nonzero", "equal", "allclose"}
_PATIENCE = 64  # reads, after which a loop of a step without blocks is told to end
_ATTACHES = {"register_hook", "retain_grad"}  # code that runs in the backward
_RESHAPES = set("view reshape transpose contiguous to long int __getitem__ flatten unsqueeze squeeze clone".split())


class Recorder(TorchFunctionMode):
    """Records one run of a module.

    Args:
        module: the copy that will run.
        containers: of its blocks.
        inputs: the batch, so that its tensors are known as such.
        may_loop: whether the blocks may run again after they have all run; the run then ends as `Loop` says.
    """

    def __init__(self, module: nn.Module, containers: Containers, inputs: Any, may_loop: bool = False) -> None:
        super().__init__()
        self.module = module
        self.calls = Calls(module, containers, self._number, may_loop)
        self._reads: list[int] = []  # operations that had run when the code read the value of a tensor
        self.ops: list[Op] = []
        self.numbering = Numbering()
        self.notes: list[str] = []
        self.layers: dict[str, Layer] = {}
        self.parameters = parameters_of(module)
        self.flops: Counter[int] = Counter()  # by part
        self.module_flops: Counter[str] = Counter()  # by the innermost module that ran
        self.attention = AttentionFlops()
        self._tokens = tokens_of(inputs)
        self.saved_bytes: Counter[int] = Counter()
        self._custom: set[int] = set()  # numbers of what the user's autograd functions made
        self._names = {id(p): name for name, p in reversed(list(module.named_parameters(remove_duplicate=False)))}
        self._state = state_of(module)  # buffers and the like, by id
        self._writes: list[tuple[str, str, int]] = []
        self._looked_at: list[tuple[int, str, int]] = []
        self._logged: list[tuple[int, int]] = []
        self._stack: list[str] = []
        self._inside_layer = 0
        self._num_called: Counter[str] = Counter()
        self._outputs: dict[int, list[Output]] = {}
        self._returned: tuple[int, ...] = ()
        self._storages = {storage_key(p) for p in module.parameters()}  # counted, or no activations
        self._counted_flops = 0
        for tensor in tensors_in(inputs):
            self._number(tensor, value_of(tensor, False, -1, is_batch=True))

    # ------------------------------------------------------------------ running

    @contextlib.contextmanager
    def running(self, flops: FlopCounterMode) -> Iterator[None]:
        """Around the step: hooks on every module, saved activations counted, this mode on."""
        self._flop_counter = flops
        handles = []
        for name, child in self.module.named_modules():
            if isinstance(child, torch.jit.ScriptModule):
                continue  # takes no hooks
            if layer_kind(child) is not None:  # around the layer alone, inside the user's own hooks on it
                handles.append(child.register_forward_pre_hook(self._enter_layer))
                handles.append(child.register_forward_hook(self._leave_layer(name), with_kwargs=True, prepend=True))
            handles.append(child.register_forward_pre_hook(self._enter(name), with_kwargs=True, prepend=True))
            handles.append(child.register_forward_hook(self._leave(name), with_kwargs=True))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._count_saved, lambda packed: packed), self:
                yield
        finally:
            self._count_flops()
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func)).removesuffix(".default")  # of an operator, as the unpacking of a saved tensor
        if name in _LEAVES_TORCH:
            self._reads.append(len(self.ops))
            self._looked_at += [(self._number(tensor), name, self.calls.parts.current) for tensor in tensors_in(args)]
        if name in _READS_VALUE and isinstance(args[0], torch.Tensor) and self._is_unknown(args[0]):
            value = _READS_VALUE[name]
            if name == "item" and not args[0].is_floating_point():
                value = False if args[0].dtype == torch.bool else 1
            if name == "__bool__" and self.calls.loop is not None and not self.calls.num_blocks and len(self._reads) > _PATIENCE:
                value = True  # it may be a loop that waits for it
            self._note(f"{self._where()} reads a value of a tensor ({name}); the dry run assumes {value}")
            return value
        output = func(*args, **kwargs) if func is not torch.autograd.grad else _no_gradients(*args, **kwargs)
        if name == "__iter__":
            output = list(output)
        if self._inside_layer == 0 and name not in ("__get__", "__set__"):
            self._record(name, args, kwargs, output)
        elif name == "__get__" and isinstance(output, torch.Tensor) and self._inside_layer == 0:
            self._record("attribute", args, kwargs, output)
        return iter(output) if name == "__iter__" else output

    def _is_unknown(self, tensor: torch.Tensor) -> bool:
        return is_fake(tensor)

    # ------------------------------------------------------------------ operations

    def _record(
        self, name: str, args: Any, kwargs: Any, output: Any, layer: str | None = None, parameters: tuple[str, ...] = ()
    ) -> None:
        outputs = tensors_in(output)
        if name == "__setitem__":
            outputs = [args[0]]
        if not outputs and (name not in _ATTACHES or _is_of_torch(args)):
            return
        inputs = tensors_in((args, kwargs))
        for tensor in inputs:
            self._record_custom_function(tensor)
        read = parameters or tuple(self._names[id(t)] for t in inputs if id(t) in self._names)
        numbers = tuple(self._number(t) for t in inputs if id(t) not in self._names)
        depends = bool(read) or any(self.numbering.values[n].depends_on_parameters for n in numbers)
        is_batch = name in _RESHAPES and bool(numbers) and all(self.numbering.values[n].is_batch for n in numbers)
        made = tuple(
            self._number(t, value_of(t, depends, self.calls.parts.current, is_batch)) for t in outputs if id(t) not in self._names
        )
        is_write = len(outputs) == 1 and bool(args) and outputs[0] is args[0] and (name.endswith("_") or kwargs.get("inplace"))
        if is_write and id(outputs[0]) in self._state:
            self._writes.append((self._state[id(outputs[0])], name, self.calls.parts.current))
        views = bool(is_write) and self.numbering.has_views(outputs[0])
        self._append(name, numbers, made, read, layer, plain_arguments(args, kwargs), views, bool(is_write))

    def _append(
        self,
        name: str,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        parameters: tuple[str, ...],
        layer: str | None,
        arguments: tuple[Any, ...],
        writes_view: bool = False,
        writes: bool = False,
    ) -> None:
        module = self._stack[-1] if self._stack else ""
        block = self.calls.open_blocks[0] if self.calls.open_blocks else ""
        part = self.calls.parts.current
        self.ops.append(Op(name, module, part, inputs, outputs, parameters, layer, arguments, block, writes_view, writes))

    def _record_custom_function(self, tensor: torch.Tensor) -> None:
        """Record the backward of the user's ``autograd.Function`` that made a tensor, once; its forward was seen.

        ``apply`` stands for the call: it passes the value on and gives its gradient, with which the backward runs.
        """
        function = custom_function(tensor)
        if function is None or self._number(tensor) in self._custom:
            return
        with unseen_by_modes():
            gradient = torch.ones_like(tensor)
            backward = backward_call(tensor, gradient)
        number = self._number(tensor)
        value = replace(self.numbering.values[number], depends_on_parameters=True, phase=self.calls.parts.current)
        after = self._number(tensor, value)
        self._custom.add(after)
        self._append("apply", (number,), (after, self._number(gradient, value)), (), None, (function.__name__,))
        try:
            with self, torch.no_grad():
                backward()
        except Exception as error:
            what = f"the autograd.Function {function.__name__}, whose backward cannot be run dry ({error})"
            self._append("opaque", (after,), (), (), None, (what,))

    def _number(self, tensor: torch.Tensor, new: Value | None = None) -> int:
        return self.numbering.number(tensor, self.calls.parts.current, new)

    # ------------------------------------------------------------------ modules

    def _enter(self, name: str) -> Any:
        is_block = self.calls.is_block(name)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._num_called[name] += 1
            self._count_flops()
            if is_block:
                self.calls.enter(name, args, kwargs, len(self.ops))
            elif self.calls.loop is not None and not self._stack:
                self.calls.loop.enter(name, len(self.ops), self.calls.is_complete)
            self._stack.append(name)

        return hook

    def _enter_layer(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inside_layer += 1

    def _leave_layer(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            kind = layer_kind(module)
            self._inside_layer -= 1
            if self._inside_layer == 0 and kind is not None:
                self._record_layer(name, kind, module, args, kwargs, output)

        return hook

    def _leave(self, name: str) -> Any:
        is_block = self.calls.is_block(name)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if has_backward_hook(module):
                seen = tuple(self._number(tensor) for tensor in tensors_in((args, kwargs, output)))
                self._append("opaque", seen, (), (), None, (f"a backward hook of {type(module).__name__}",))
            self._count_flops()
            self._stack.pop()
            if is_block:
                self.calls.leave(name, args, kwargs, output)
            if not self.calls.open_blocks and self.calls.is_first_pass:
                self._note_output(name, output)

        return hook

    def _note_output(self, name: str, output: Any) -> None:
        for path, tensor in tensors_by_path(output):
            number = self.numbering.object_of(tensor)
            if number is not None:
                self._outputs.setdefault(number, []).append(Output(name, path, self.calls.parts.current))

    def _record_layer(self, name: str, kind: LayerKind, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        parameters = tuple(f"{name}.{key}" for key, parameter in module._parameters.items() if parameter is not None)
        if name not in self.layers:
            rows, columns = module.weight.shape
            sizes = {"linear": (columns, rows), "conv1d": (rows, columns), "embedding": (rows, columns)}[kind]
            bias = f"{name}.bias" if getattr(module, "bias", None) is not None else None
            self.layers[name] = Layer(name, kind, *sizes, f"{name}.weight", bias)
        self._record(kind, args, kwargs, output, layer=name, parameters=parameters)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """What ``self.log`` of the module is during the run."""
        self._logged += [(self._number(tensor), self.calls.parts.current) for tensor in tensors_in((args, kwargs))]

    def returned(self, output: Any) -> None:
        """After a run, which returned ``output``: the blocks as a chain, or why they are none."""
        self._returned = tuple(self._number(tensor) for tensor in tensors_in(output))
        self.calls.follow(self.ops[: self._end_of_first_pass], self.numbering.values, self._returned)

    @property
    def _end_of_first_pass(self) -> int:
        """Operations of the run, or of its first pass where there were two."""
        loop = self.calls.loop
        return len(self.ops) if loop is None or loop.end is None else loop.end

    # ------------------------------------------------------------------ counting

    def _count_flops(self) -> None:
        total = self._flop_counter.get_total_flops()
        counted = total - self._counted_flops
        if counted and self.calls.is_first_pass:
            self.flops[self.calls.parts.current] += counted
            self.module_flops[self._stack[-1] if self._stack else ""] += counted
        self._counted_flops = total

    def _count_saved(self, tensor: torch.Tensor) -> torch.Tensor:
        place = place_of(tensor)
        if place is not None and place[0] not in self._storages:
            self._storages.add(place[0])
            self.saved_bytes[self.calls.parts.current] += tensor.untyped_storage().nbytes()
        return tensor

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _where(self) -> str:
        return self._stack[-1] if self._stack and self._stack[-1] else "the step"

    # ------------------------------------------------------------------ the result

    def finish(self, step: str, chains_seen: tuple[tuple[str, str], ...], batch_size: int, error: Exception | None = None) -> Trace:
        """The trace of the run that has ended."""
        blocks, end = self.calls.blocks, self._end_of_first_pass
        phases = self.calls.parts.phases([block.path for block in blocks])
        ops = in_phases(self.ops, phases)
        return Trace(
            step=step,
            chains=self.calls.chains,
            chains_seen=chains_seen,
            blocks=blocks,
            ops=tuple(ops[:end]),
            again=tuple(ops[end:]),
            values=tuple(in_phases(self.numbering.values, phases)),
            layers=self.layers,
            parameters=self.parameters,
            flops=by_phase(self.flops, phases, 2 * len(blocks) + 1),
            module_flops=dict(self.module_flops),
            saved_bytes=by_phase(self.saved_bytes, phases, 2 * len(blocks) + 1),
            batch_size=batch_size,
            attention_flops=(self.attention.causal, self.attention.whole),
            tokens=self._tokens,
            notes=tuple(self.notes),
            error=error,
            leaving=frozenset(self.calls.leaving),
            first_read=min((read for read in self._reads if read <= end), default=None),
            objects=tuple(self.numbering.objects),
            memories=tuple(self.numbering.memories),
            outputs=self._outputs_of_single_calls(phases),
            returned=self._returned,
            logged=tuple((number, phases[part]) for number, part in self._logged),
            looked_at=tuple((number, name, phases[part]) for number, name, part in self._looked_at),
            writes=tuple((path, name, phases[part]) for path, name, part in self._writes),
        )

    def _outputs_of_single_calls(self, phases: list[int]) -> dict[int, tuple[Output, ...]]:
        return {
            number: once
            for number, outputs in self._outputs.items()
            if (once := tuple(in_phases([out for out in outputs if self._num_called[out.module] == 1], phases)))
        }


def _no_gradients(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """What stands for ``torch.autograd.grad``, which does not run below a `FlopCounterMode`."""
    return tuple(torch.zeros_like(tensor) for tensor in tensors_in(inputs))


def _is_of_torch(args: tuple[Any, ...]) -> bool:
    """Whether a hook is one of torch's own, such as those that count operations by module."""
    return any(getattr(argument, "__module__", "").startswith("torch.") for argument in args[1:])
