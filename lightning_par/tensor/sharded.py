"""A tensor that shows its global shape and computes on the part that this rank holds.

Between a column-parallel and a row-parallel layer the user's code works on activations that are cut over the tp axis,
with sizes written for the whole tensor: ``qkv.view(B, T, n_head, C // n_head)``. A `ShardedTensor` keeps that code right.

    x.view(...)  ->  __torch_function__  ->  the rule of ``view``  ->  x.local.view(...), wrapped again
                                         ->  no rule: gather, run on plain tensors, and count it in ``axis.gathers``

Autograd runs on ``local``; the wrapper itself is never part of a graph.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from lightning_par.errors import ModelError
from lightning_par.runtime.axis import Axis, finest_axis
from lightning_par.runtime.collective import gather_from, scatter_to
from lightning_par.runtime.nested import map_tensors
from lightning_par.runtime.parameter import Split
from lightning_par.tensor.copies import DoubleSplit, cut_over
from lightning_par.tensor.ghost import filled, has_ghosts, local_size, without_ghosts
from lightning_par.tensor.registry import RULES, NoRule, function_name

_CHANGING_OPERATORS = "setitem iadd isub imul itruediv idiv ifloordiv imod ipow iand ior ixor ilshift irshift".split()


class ShardedTensor(torch.Tensor):
    """A tensor cut over an axis, seen from one of its ranks.

    Attributes:
        local: the part of this rank, a plain tensor. Its size along ``shard_dim`` is the global one over ``axis.size``; where
            that does not divide, it ends in ghosts (`lightning_par.tensor.ghost`). Its gradient is what this rank adds to that of
            the part, which other ranks may hold too (`lightning_par.tensor.copies`).
        shard_dim: the dim that is cut, from 0.
        segments: global sizes along ``shard_dim`` that are cut each on its own; one for a plain cut (see `Split`).
        axis: the axis it is cut over, whose size counts parts.
    """

    _local: torch.Tensor
    shard_dim: int
    segments: tuple[int, ...]
    axis: Axis
    _shape: torch.Size
    _guarded: bool

    @staticmethod
    def __new__(cls, local: torch.Tensor, shard_dim: int, segments: tuple[int, ...], axis: Axis) -> ShardedTensor:
        """Wrap the part of this rank, which must have the local sizes of `Split`."""
        shape = list(local.shape)
        assert shape[shard_dim] == local_size(segments, axis), (shape, shard_dim, segments)
        shape[shard_dim] = sum(segments)
        self = torch.Tensor._make_wrapper_subclass(  # the constructor that torch's page on wrapper subclasses names
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=local.requires_grad
        )
        self._local, self.shard_dim, self.segments, self.axis = local, shard_dim, segments, axis
        self._shape, self._guarded = torch.Size(shape), False
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not args and "input" in kwargs and "condition" not in kwargs:  # all by name; the first everywhere but in where
            args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
        rule = RULES.get(func)
        if rule is not None:
            try:
                return rule(func, args, kwargs)
            except NoRule:
                pass
        return _on_gathered(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        """Refuse what comes past ``__torch_function__``: it would read a storage that does not exist."""
        raise ModelError(f"{func} was called on a sharded tensor from compiled code: call x.full_tensor() on it first")

    @property
    def local(self) -> torch.Tensor:
        local = self._local
        if torch.is_grad_enabled() != local.requires_grad:
            self._guard()
        return local

    @property
    def cut(self) -> Split:
        """How it is cut among the ranks."""
        return cut_over(self.axis, self.shard_dim, self.segments)

    @property
    def double_cut(self) -> DoubleSplit:
        """How it is cut among the ranks along two dims, see [Note: two cuts] in `lightning_par.tensor.copies`."""
        assert isinstance(self._local, ShardedTensor)
        return DoubleSplit(self.shard_dim, self.segments, share=self._local.cut, num_shares=self._local.axis.size)

    @property
    def is_padded(self) -> bool:
        """Whether it does not divide, so that some ranks hold ghosts."""
        return has_ghosts(self.segments, self.axis)

    def without_ghosts(self) -> torch.Tensor:
        """The local part without its ghosts, whose size along ``shard_dim`` differs from rank to rank."""
        return without_ghosts(self.local, self.cut, self.axis)

    def filled(self, value: float) -> torch.Tensor:
        """The local part with ``value`` on its ghosts."""
        return filled(self.local, self.cut, self.axis, value)

    def full_tensor(self) -> torch.Tensor:
        """The global tensor, on every rank. Collective over the axis; its gradient is sliced."""
        if isinstance(self._local, ShardedTensor):
            return gather_from(self._local.local, self.axis, self.double_cut)
        return gather_from(self.local, self.axis, self.cut)

    def map_local(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ShardedTensor:
        """The same cut of ``function(local)``, which must keep the shape."""
        return self.rewrap(function(self.local))

    def rewrap(self, local: torch.Tensor) -> ShardedTensor:
        """Another local part, cut in the same way."""
        return ShardedTensor(local, self.shard_dim, self.segments, self.axis)

    def follow_local(self) -> None:
        """Note that ``local`` was changed in place and may require a gradient by now; see `_guard`."""
        if self._local.requires_grad:
            torch.Tensor.__torch_function__(torch.Tensor.requires_grad_, (), (self,))

    def _guard(self) -> None:
        """Keep a custom ``autograd.Function`` from losing gradients, since it ties its graph to the wrapper.

        Its outputs are wrappers that require a gradient around a part that does not. Its inputs are used while gradients
        are disabled; a gradient that arrives at such a wrapper later has nowhere to go.
        """
        if torch.is_grad_enabled():
            if _of_wrapper(torch.Tensor.requires_grad, self):
                _refuse_function(type(_of_wrapper(torch.Tensor.grad_fn, self)).__name__.removesuffix("Backward"))
        elif not self._guarded and _of_wrapper(torch.Tensor.requires_grad, self):
            self._guarded = True
            _hook_wrapper(self)

    # What user code reads all the time is answered here, without dispatch.

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self._shape

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return len(self._shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._local.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._local.device

    @property
    def requires_grad(self) -> bool:
        return self._local.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._local.requires_grad = value

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        return self._local.grad_fn

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        return self._local.is_leaf

    def size(self, dim: int | None = None) -> Any:
        return self._shape if dim is None else self._shape[dim]

    def dim(self) -> int:
        return len(self._shape)

    def numel(self) -> int:
        return self._shape.numel()

    def __len__(self) -> int:
        return self._shape[0]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        axis, cut = finest_axis(self.axis), self.cut
        where = f"dim {cut.dim}" + (f" in segments {cut.segments}" if len(cut.segments) > 1 else "")
        where += f" with copies {cut.copies}" if cut.copies else ""
        return (
            f"ShardedTensor(shape={tuple(self._shape)}, dtype={self.dtype}, device={self.device}, cut along {where}, "
            f"part {axis.coordinate} of {axis.size} over {axis.name}: {self._local!r})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedTensor:
        return self.rewrap(copy.deepcopy(self._local, memo))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ModelError("a sharded tensor holds the part of one rank and cannot be saved: save x.full_tensor() instead")


def _of_wrapper(descriptor: Any, tensor: ShardedTensor) -> Any:
    """An attribute of the wrapper as torch itself sees it, not of ``local``."""
    return torch.Tensor.__torch_function__(descriptor.__get__, (), (tensor,))


def _hook_wrapper(tensor: ShardedTensor) -> None:
    """Hook `_refuse_gradient` to the wrapper. ``register_hook`` would ask for its ``grad_fn`` and get the one of ``local``."""
    descriptor: Any = torch.Tensor._backward_hooks
    torch.Tensor.__torch_function__(descriptor.__set__, (), (tensor, OrderedDict({0: _refuse_gradient})))
    node = _of_wrapper(torch.Tensor.grad_fn, tensor)
    if node is not None:
        node._register_hook_dict(tensor)


def _refuse_gradient(grad: torch.Tensor) -> NoReturn:
    _refuse_function("a custom autograd function")


def _refuse_function(name: str) -> NoReturn:
    instead = "call it on x.full_tensor(), or write it with torch functions"
    if name == "CheckpointFunction":  # of torch.utils.checkpoint
        instead = "checkpoint with use_reentrant=False, or by recompute=full of the strategy"
    raise ModelError(f"{name} was applied to a sharded tensor, and autograd.Function has no hook that could shard it: {instead}")


def _on_gathered(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``function`` on global tensors. Always right; costs a gather of each sharded argument, and is counted.

    A function that changes its first argument (``x.op_()``, ``x[i] = y``) or ``out=`` changes the gathered copy, whose
    part is then copied back.
    """
    sharded: dict[int, tuple[ShardedTensor, torch.Tensor]] = {}

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, ShardedTensor):
            return tensor
        if id(tensor) not in sharded:
            tensor.axis.gathers[function_name(function)] += 1
            sharded[id(tensor)] = (tensor, tensor.full_tensor())
        return sharded[id(tensor)][1]

    result = function(*map_tensors(whole, args), **map_tensors(whole, kwargs))
    target = kwargs.get("out", args[0] if args and _changes_first_argument(function) else None)
    if not isinstance(target, ShardedTensor):
        return result
    changed = sharded[id(target)][1]
    if changed.shape != target.shape:
        raise ModelError(f"{function_name(function)} would change the shape of a sharded tensor in place: use its plain form")
    if isinstance(target.local, ShardedTensor):
        target.local.local.copy_(scatter_to(changed, target.axis, target.double_cut))
    else:
        target.local.copy_(scatter_to(changed, target.axis, target.cut))
    target.follow_local()
    return target if result is changed else result


def _changes_first_argument(function: Callable[..., Any]) -> bool:
    name = function.__name__
    if name.startswith("__"):
        return name.strip("_") in _CHANGING_OPERATORS
    return name.endswith("_")


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or the plain global one of a tensor that is cut over tp. A collective over tp then."""
    return tensor.full_tensor() if isinstance(tensor, ShardedTensor) else tensor
