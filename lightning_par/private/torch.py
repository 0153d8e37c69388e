"""Every private name of torch that this package relies on, with the reason. Read in torch 2.13."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch._compile import _disable_dynamo as runs_as_written  # torch.compiler.disable imports the compiler for all at once
from torch._subclasses.fake_tensor import (  # the only way to run a step without memory for its tensors
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.autograd.graph import GradientEdge, _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef  # knows whether memory is still there, without holding it
from torch.utils._python_dispatch import (
    TorchDispatchMode,  # sees the operations below autograd, collectives among them
    _disable_current_modes,
)

Place = tuple[int, int, tuple[int, ...], tuple[int, ...]]

__all__ = [
    "FakeTensorMode",
    "Place",
    "StorageWeakRef",
    "TorchDispatchMode",
    "alias_below_autograd",
    "allow_versions",
    "backward_call",
    "beside_fakes",
    "call_as_written",
    "custom_function",
    "finished_work",
    "generator_key",
    "has_backward_hook",
    "has_gradient_hook",
    "has_memory",
    "is_compiled",
    "is_data_dependent",
    "is_fake",
    "is_gradient_wanted",
    "is_plain",
    "outside_modes",
    "place_of",
    "run_backward",
    "runs_as_written",
    "storage_key",
    "swap_contents",
    "trunc_normal_by",
    "unscale_gradients",
    "unseen_by_modes",
]


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape but no values."""
    return isinstance(tensor, FakeTensor)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of no class of its own: a subclass may compute otherwise. A fake one stands for a plain one."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter, FakeTensor)


def is_data_dependent(error: BaseException) -> bool:
    """Whether a run on fake tensors failed because the code needs the tensors' values."""
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return True
    return "Cannot access data pointer" in str(error) or "fake tensor" in str(error).lower()


def beside_fakes() -> AbstractContextManager[object]:
    """Inside, functions of real tensors run on their values, also during a run on fake ones."""
    context: AbstractContextManager[object] = unset_fake_temporarily()
    return context


def unseen_by_modes() -> AbstractContextManager[None]:
    """Inside, torch functions reach no `TorchFunctionMode`, and no tensor's own ``__torch_function__``."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


@contextmanager
def outside_modes() -> Iterator[None]:
    """Inside, operations reach neither a `TorchDispatchMode` nor a `TorchFunctionMode`."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def generator_key(generator: torch.Generator) -> int:
    """A number of a generator while it is alive: an operation gets another Python object for it than the user has."""
    key: int = generator._cdata  # type: ignore[attr-defined]
    return key


def swap_contents(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Let two tensors of one class change places; the Python objects stay who they are.

    What ``torch.utils.swap_tensors`` ends in: that refuses a tensor with a weak reference to it, which the weights of
    ``nn.LSTM`` have.
    """
    torch._C._swap_tensor_impl(tensor, other)


def storage_key(tensor: torch.Tensor) -> int:
    """A number that two tensors share while both are alive exactly if they are views of one storage."""
    return tensor.untyped_storage()._cdata  # data_ptr() is 0 for every fake tensor


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in a storage of its device, of which a fake tensor has the size."""
    return tensor.layout == torch.strided and tensor.device.type != "meta"


def alias_below_autograd(tensor: torch.Tensor) -> torch.Tensor:
    """An alias, made inside a `TorchDispatchMode`, that counts changes in place together with ``tensor``.

    As ``torch.utils.checkpoint`` makes its own: a plain ``detach`` there has a counter to itself.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def finished_work() -> Any:
    """What a collective's operation returns, of one that has ended."""
    import torch._C._distributed_c10d as c10d  # here, because it is not there without torch.distributed

    future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
    future.set_result([])
    return c10d._create_work_from_future(future).boxed()  # type: ignore[attr-defined]  # nothing else makes one without a collective


def call_as_written(module: torch.nn.Module) -> None:
    """Undo ``torch.compile`` on a copy of a module, whose compiled call is bound to the module that it was copied from."""
    if module.__dict__.get("_compiled_call_impl") is not None:  # made by module.compile()
        module.__dict__["_compiled_call_impl"] = None
    if type(module).__name__ == "OptimizedModule":  # the wrapper that torch.compile(module) returns
        module.__dict__["forward"] = module._modules["_orig_mod"]


def place_of(tensor: torch.Tensor) -> Place | None:
    """Storage, offset, shape and strides: equal for tensors of the same elements. None for one without a storage of its own."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, FakeTensor) or tensor.layout != torch.strided:
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # inside vmap and the like
        return None
    return storage_key(tensor), int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())


def custom_function(tensor: torch.Tensor) -> type[torch.autograd.Function] | None:
    """The user's ``autograd.Function`` that made a tensor; torch's own (of its checkpoints) and ours are known to be right."""
    function = getattr(type(tensor.grad_fn), "_forward_cls", None)
    if function is None or function.__module__.split(".")[0] in ("torch", "lightning_par"):
        return None
    found: type[torch.autograd.Function] = function
    return found


def backward_call(tensor: torch.Tensor, gradient: torch.Tensor) -> Callable[[], object]:
    """What runs the backward of the ``autograd.Function`` that made ``tensor``, without the graph before it."""
    node: Any = tensor.grad_fn
    gradients = [gradient.new_zeros(output.shape) for output in node._input_metadata]
    gradients[tensor.output_nr] = gradient
    return partial(node.apply, *gradients)


def run_backward(roots: Sequence[torch.Tensor | GradientEdge], gradients: Sequence[torch.Tensor]) -> None:
    """Run the graph from ``roots``, whose gradients have their shapes, and add up in ``grad`` of its leaves.

    What ``torch.autograd.backward`` ends in; what that does before takes longer than the host has for a stage.
    """
    _engine_run_backward(tuple(roots), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True)


def has_backward_hook(module: torch.nn.Module) -> bool:
    """Whether the user's code sees the gradients of a module's inputs or outputs."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def has_gradient_hook(parameter: torch.nn.Parameter) -> bool:
    """Whether the user's code sees the gradient of a parameter."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def is_gradient_wanted(node: Any, index: int) -> bool:
    """Inside the backward of an ``autograd.Function``: whether the gradient of its input ``index`` goes anywhere in this backward.

    ``needs_input_grad`` says what was true in the forward: of a weight it is true in ``torch.autograd.grad(y, x)`` too.
    """
    return bool(torch._C._will_engine_execute_node(node.next_functions[index][0]))


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether calling a module runs what torch.compile made of it."""
    return module.__dict__.get("_compiled_call_impl") is not None or type(module).__name__ == "OptimizedModule"


def unscale_gradients(gradients: Iterable[torch.Tensor], found: torch.Tensor, inverse_scale: torch.Tensor) -> None:
    """Multiply all by ``inverse_scale``, and set ``found`` to 1 if one is infinite or undefined.

    One pass over each gradient; what ``torch.amp.GradScaler.unscale_`` runs.
    """
    of_dtype = defaultdict[torch.dtype, list[torch.Tensor]](list)
    for gradient in gradients:
        of_dtype[gradient.dtype].append(gradient)
    for same in of_dtype.values():
        torch._amp_foreach_non_finite_check_and_unscale_(same, found, inverse_scale)


def allow_versions(count: int) -> None:
    """Let torch.compile make at least ``count`` versions of one piece of code, before it leaves that as written."""
    from torch._dynamo import config  # here, because it imports the compiler

    config.recompile_limit = max(config.recompile_limit, count)


@contextmanager
def trunc_normal_by(function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Inside, ``torch.nn.init.trunc_normal_`` calls ``function`` with its own implementation and its arguments.

    That implementation does nothing for tensors on the meta device. The public function cannot be replaced: other libraries
    hold on to it.
    """
    from torch.nn import init

    original = init._no_grad_trunc_normal_
    init._no_grad_trunc_normal_ = partial(function, original)
    try:
        yield
    finally:
        init._no_grad_trunc_normal_ = original
