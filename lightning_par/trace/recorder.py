"""The recorder: sees every torch function of a running step and writes the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_par.private.torch import is_fake, storage_key
from lightning_par.runtime.nested import tensors_in
from lightning_par.trace.passage import BlockCall, NoChain, follow_blocks, output_by_key
from lightning_par.trace.record import Block, Layer, LayerKind, Op, ParameterInfo, Trace, Value

_READS_VALUE = {"item": 1.0, "__float__": 1.0, "__int__": 1, "__index__": 1, "__bool__": False}  # what the dry run assumes
_RESHAPES = set("view reshape transpose contiguous to long int __getitem__ flatten unsqueeze squeeze clone".split())


class Recorder(TorchFunctionMode):
    """Records one run of a module.

    Args:
        module: the copy that will run.
        chain: path of its container of blocks, or None.
        inputs: the batch, so that its tensors are known as such.
    """

    def __init__(self, module: nn.Module, chain: str | None, inputs: Any) -> None:
        super().__init__()
        self.module, self.chain = module, chain
        blocks = module.get_submodule(chain)._modules if chain is not None else {}
        self._block_numbers = {f"{chain}.{key}" if chain else key: index for index, key in enumerate(blocks)}
        self.num_blocks = len(blocks)
        self.chain_fault: str | None = None  # why the blocks are no chain
        self.phase = 0
        self.ops: list[Op] = []
        self.values: list[Value] = []
        self.notes: list[str] = []
        self.layers: dict[str, Layer] = {}
        self.parameters = _parameters(module)
        self.flops = [0] * (2 * self.num_blocks + 1)
        self.saved_bytes = [0] * (2 * self.num_blocks + 1)
        self._numbers: dict[int, int] = {}  # id of a tensor -> number of its newest version
        self._alive: list[torch.Tensor] = []  # so that no id is used twice
        self._names = {id(p): name for name, p in reversed(list(module.named_parameters(remove_duplicate=False)))}
        self._stack: list[str] = []
        self._inside_layer = 0
        self._calls: list[BlockCall] = []
        self._blocks: tuple[Block, ...] = ()
        self._storages = {storage_key(p) for p in module.parameters()}  # counted, or no activations
        self._counted_flops = 0
        for tensor in tensors_in(inputs):
            self._number(tensor, Value(tuple(tensor.shape), tensor.is_floating_point(), False, -1, is_batch=True))

    # ------------------------------------------------------------------ running

    @contextlib.contextmanager
    def running(self, flops: FlopCounterMode) -> Iterator[None]:
        """Around the step: hooks on every module, saved activations counted, this mode on."""
        self._flop_counter = flops
        handles = []
        for name, child in self.module.named_modules():
            handles.append(child.register_forward_pre_hook(self._enter(name), with_kwargs=True, prepend=True))
            handles.append(child.register_forward_hook(self._leave(name), with_kwargs=True))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._count_saved, lambda packed: packed), self:
                yield
            self._follow_blocks()
        finally:
            self._count_flops()
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in _READS_VALUE and isinstance(args[0], torch.Tensor) and self._is_unknown(args[0]):
            value = _READS_VALUE[name]
            if name == "item" and not args[0].is_floating_point():
                value = False if args[0].dtype == torch.bool else 1
            self._note(f"{self._where()} reads a value of a tensor ({name}); the dry run assumes {value}")
            return value
        output = func(*args, **kwargs)
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
        if not outputs:
            return
        inputs = tensors_in((args, kwargs))
        read = parameters or tuple(self._names[id(t)] for t in inputs if id(t) in self._names)
        numbers = tuple(self._number(t) for t in inputs if id(t) not in self._names)
        depends = bool(read) or any(self.values[n].depends_on_parameters for n in numbers)
        is_batch = name in _RESHAPES and bool(numbers) and all(self.values[n].is_batch for n in numbers)
        made = tuple(
            self._number(t, Value(tuple(t.shape), t.is_floating_point(), depends, self.phase, is_batch))
            for t in outputs
            if id(t) not in self._names
        )
        module = self._stack[-1] if self._stack else ""
        self.ops.append(Op(name, module, self.phase, numbers, made, read, layer, _plain(args, kwargs)))

    def _number(self, tensor: torch.Tensor, new: Value | None = None) -> int:
        """The number of a tensor's newest version; ``new`` makes one."""
        key = id(tensor)
        if new is None and key in self._numbers:
            return self._numbers[key]
        if new is None:  # seen for the first time: there before the step, unless a function that torch does not show made it
            made = tensor.requires_grad
            new = Value(tuple(tensor.shape), tensor.is_floating_point(), made, self.phase if made else -1)
        self._alive.append(tensor)
        self.values.append(new)
        self._numbers[key] = len(self.values) - 1
        return self._numbers[key]

    # ------------------------------------------------------------------ modules

    def _enter(self, name: str) -> Any:
        block = self._block_numbers.get(name)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if block is not None:
                self._enter_block(block, name, args, kwargs)
            self._stack.append(name)
            if layer_kind(module) is not None:
                self._inside_layer += 1

        return hook

    def _leave(self, name: str) -> Any:
        block = self._block_numbers.get(name)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            kind = layer_kind(module)
            if kind is not None:
                self._inside_layer -= 1
                if self._inside_layer == 0:
                    self._record_layer(name, kind, module, args, kwargs, output)
            self._stack.pop()
            if block is not None:
                self._leave_block(block, name, output)

        return hook

    def _record_layer(self, name: str, kind: LayerKind, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        parameters = tuple(f"{name}.{key}" for key, parameter in module._parameters.items() if parameter is not None)
        if name not in self.layers:
            rows, columns = module.weight.shape
            sizes = {"linear": (columns, rows), "conv1d": (rows, columns), "embedding": (rows, columns)}[kind]
            bias = f"{name}.bias" if getattr(module, "bias", None) is not None else None
            self.layers[name] = Layer(name, kind, *sizes, f"{name}.weight", bias)
        self._record(kind, args, kwargs, output, layer=name, parameters=parameters)

    def _enter_block(self, index: int, name: str, args: Any, kwargs: Any) -> None:
        if index != len(self._calls):
            after = f"after {self._calls[-1].path}" if self._calls else "first"
            self.chain_fault = self.chain_fault or f"its blocks do not run once each, in order ({name} ran {after})"
        if self.chain_fault is None:
            self._count_flops()
            self.phase = 2 * index + 1
            arguments: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
            self._calls.append(BlockCall(name, {k: self._number(a) for k, a in arguments.items() if isinstance(a, torch.Tensor)}))

    def _leave_block(self, index: int, name: str, output: Any) -> None:
        if self.chain_fault is not None:
            return
        self._count_flops()
        self.phase = 2 * index + 2
        try:
            outputs = output_by_key(output, name)
        except NoChain as fault:
            self.chain_fault = str(fault)
            return
        call = self._calls[-1]
        call.keys = () if None in outputs else tuple(outputs)
        call.results = {key: self._number(t) for key, t in outputs.items() if isinstance(t, torch.Tensor)}

    def _follow_blocks(self) -> None:
        """After a whole run: the blocks as a chain, or why they are none."""
        if len(self._calls) < self.num_blocks:
            self.chain_fault = self.chain_fault or f"the step runs {len(self._calls)} of its {self.num_blocks} blocks"
        if self.chain_fault is None:
            try:
                self._blocks = follow_blocks(self._calls, self.ops, self.values)
            except NoChain as fault:
                self.chain_fault = str(fault)

    # ------------------------------------------------------------------ counting

    def _count_flops(self) -> None:
        total = self._flop_counter.get_total_flops()
        self.flops[self.phase] += total - self._counted_flops
        self._counted_flops = total

    def _count_saved(self, tensor: torch.Tensor) -> torch.Tensor:
        key = storage_key(tensor)
        if key not in self._storages:
            self._storages.add(key)
            self.saved_bytes[self.phase] += tensor.untyped_storage().nbytes()
        return tensor

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _where(self) -> str:
        return self._stack[-1] if self._stack and self._stack[-1] else "the step"

    # ------------------------------------------------------------------ the result

    def finish(self, step: str, chains_seen: tuple[tuple[str, str], ...], batch_size: int, error: Exception | None = None) -> Trace:
        """The trace of the run that has ended."""
        return Trace(
            step=step,
            chain=self.chain if self._blocks else None,
            chains_seen=chains_seen,
            blocks=self._blocks,
            ops=tuple(self.ops),
            values=tuple(self.values),
            layers=self.layers,
            parameters=self.parameters,
            flops=tuple(self.flops),
            saved_bytes=tuple(self.saved_bytes),
            batch_size=batch_size,
            notes=tuple(self.notes),
            error=error,
        )


def layer_kind(module: nn.Module) -> LayerKind | None:
    """What kind of splittable layer a module is, or None; one with other parameters than a weight and a bias is none."""
    if module._parameters.get("weight") is None or module._parameters.keys() - {"weight", "bias"}:
        return None  # parametrized, quantized, or with an adapter of its own
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if any(cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__):
        return "conv1d"
    return None


def _parameters(module: nn.Module) -> dict[str, ParameterInfo]:
    aliases: dict[int, list[str]] = {}
    tensors = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    return {
        names[0]: ParameterInfo(names[0], tuple(p.shape), p.element_size(), p.requires_grad, tuple(names))
        for key, names in aliases.items()
        for p in (tensors[key],)
    }


def _plain(args: Any, kwargs: Any) -> tuple[Any, ...]:
    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return "<tensor>"
        if isinstance(value, (tuple, list)):
            return tuple(plain(item) for item in value)
        if value is None or isinstance(value, (bool, int, float, str, slice, type(Ellipsis))):
            return value
        return str(value) if isinstance(value, (torch.dtype, torch.device, torch.memory_format)) else type(value).__name__

    return tuple(plain(a) for a in args) + tuple((key, plain(value)) for key, value in sorted(kwargs.items()))
