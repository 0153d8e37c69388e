"""What operations cost: products and bytes, counted where they happen, and the seconds that a device takes for them.

An operation takes as long as the slower of two: its products at the rate of the matrix units, its reads and writes at the rate of
the memory (the roofline model, Williams et al. 2009), and never less than one launch. Operations are those of the step as it is
written; a compiler that joins some of them saves reads and writes that are counted here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import flop_registry

from lightning_par.planner.cluster import Device
from lightning_par.private.torch import TorchDispatchMode, has_memory, storage_key
from lightning_par.runtime.axis import Wait
from lightning_par.runtime.nested import tensors_in
from lightning_par.trace.attention import ATTENTION

_NUM_DIGITS = 16  # of a digest: of a million of them no two are equal by chance


@dataclass
class Work:
    """The operations of one action on one stage.

    Attributes:
        ops: for each operation its floating-point operations, those that the textbook counts (attention without causal credit),
            bytes read and written, and which of `dtypes` it computes in.
        dtypes: names of dtypes.
        sent: for each collective over tp its kind and the bytes of the whole tensor.
        spans: for each collective how many operations come before it begins, and before its result is waited for.
    """

    ops: list[tuple[float, float, float, int]] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    sent: list[tuple[str, float]] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)


class WorkCounter(TorchDispatchMode):
    """While it is entered, writes every operation into ``work``; nothing where that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Work | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.work is not None:
            self._count(self.work, func, args, kwargs, output)
        return output

    def saw(self, written: torch.Tensor, read: torch.Tensor) -> Wait | None:
        """A collective; see `lightning_par.runtime.imagined.Watcher`."""
        work = self.work
        if work is None:
            return None
        kind = "all_reduce" if written is read else "all_gather" if written.nbytes > read.nbytes else "reduce_scatter"
        place, begin = len(work.spans), len(work.ops)
        work.sent.append((kind, float(max(written.nbytes, read.nbytes))))
        work.spans.append((begin, begin))

        def wait() -> None:
            work.spans[place] = begin, len(work.ops)

        return wait

    def _count(self, work: Work, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        packet = getattr(func, "_overloadpacket", None)
        full = flops = 0.0
        if packet in flop_registry:
            full = flops = float(flop_registry[packet](*args, **kwargs, out_val=output))
        elif packet in ATTENTION:
            attention = ATTENTION[packet]
            tensors = args[attention.first : attention.first + attention.num_shapes]
            flops, full = attention.flops([tensor.shape for tensor in tensors], args, kwargs)
        read = {storage_key(t): t for t in tensors_in((args, kwargs)) if has_memory(t)}
        made = {storage_key(t): t for t in tensors_in(output) if has_memory(t)}
        if not flops and not made.keys() - read.keys() and not func._schema.is_mutable:
            return  # a view
        touched = list(read.values()) + [t for key, t in made.items() if key not in read or func._schema.is_mutable]
        numbers = [t for t in touched if t.is_floating_point()]
        dtype = str(numbers[0].dtype if numbers else torch.float32).removeprefix("torch.")
        if dtype not in work.dtypes:
            work.dtypes.append(dtype)
        work.ops.append(
            (flops, full, float(sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in touched)), work.dtypes.index(dtype))
        )


class Line:
    """Work for any number of rows, from that for two numbers of them: everything is a constant and a part for each row.

    Args:
        few, more: the same action with fewer and with more rows.
        rows: how many these are.
    """

    def __init__(self, few: Work, more: Work, rows: tuple[int, int]) -> None:
        assert len(few.ops) == len(more.ops) and few.dtypes == more.dtypes, "the step does other operations with more rows"
        self.dtypes, self.kinds, self._rows, self._spans = few.dtypes, [kind for kind, _ in few.sent], rows, few.spans
        self._ops = tuple(np.array(work.ops, dtype=float).reshape(-1, 4) for work in (few, more))
        self._sent = tuple(np.array([size for _, size in work.sent]) for work in (few, more))

    @cached_property
    def digest(self) -> str:
        """The same for the same operations in the same order, whatever module they are of."""
        found = hashlib.sha256(repr((self.dtypes, self.kinds, self._rows)).encode())
        for numbers in (*self._ops, *self._sent):
            found.update(numbers.astype("<f8").tobytes())
        return found.hexdigest()[:_NUM_DIGITS]

    def seconds(self, rows: int, device: Device) -> float:
        """On a device, without what is sent."""
        return float(self._each(rows, device).sum())

    def waits(self, rows: int, device: Device, seconds: Callable[[str, float], float], pace: float = 1.0) -> float:
        """Seconds that nothing is computed because a collective over tp is not over.

        Args:
            rows: of the microbatch.
            device: what computes meanwhile.
            seconds: of a collective, from its kind and the bytes of the whole tensor.
            pace: how many times longer than `seconds` the device takes.
        """
        if not self._spans:
            return 0.0
        computed = pace * np.concatenate(([0.0], np.cumsum(self._each(rows, device))))
        travels = [seconds(*each) for each in self.sent(rows)]
        pairs = zip(travels, self._spans, strict=True)
        return float(sum(max(0.0, travel - (computed[end] - computed[begin])) for travel, (begin, end) in pairs))

    def flops(self, rows: int) -> tuple[float, float]:
        """Floating-point operations: with causal attention counted half, and whole."""
        total = self._at(rows, *self._ops).sum(axis=0)
        return float(total[0]), float(total[1])

    def sent(self, rows: int) -> list[tuple[str, float]]:
        """Kind and bytes of each collective over tp."""
        return list(zip(self.kinds, self._at(rows, *self._sent).tolist(), strict=True))

    def _each(self, rows: int, device: Device) -> np.ndarray:
        """Seconds of each operation."""
        ops = self._at(rows, *self._ops)
        rates = np.array([rate_of(device, dtype) for dtype in self.dtypes] or [1.0])[ops[:, 3].round().astype(int)]
        each: np.ndarray = np.maximum(ops[:, 0] / rates, ops[:, 2] / device.memory_bandwidth)
        return np.maximum(each, device.launch_seconds)

    def _at(self, rows: int, few: np.ndarray, more: np.ndarray) -> np.ndarray:
        return few + (rows - self._rows[0]) / (self._rows[1] - self._rows[0]) * (more - few)


def rate_of(device: Device, dtype: str) -> float:
    """Products per second; a dtype that the cluster does not name computes as float32."""
    rates = device.flops
    return rates.get(dtype) or rates.get("float32") or max(rates.values())
