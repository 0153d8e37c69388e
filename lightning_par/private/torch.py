"""Every private name of torch that this package relies on, with the reason. Read in torch 2.13."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import (  # the only way to run a step without memory for its tensors
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

__all__ = ["FakeTensorMode", "call_as_written", "is_data_dependent", "is_fake", "storage_key"]


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape but no values."""
    return isinstance(tensor, FakeTensor)


def is_data_dependent(error: BaseException) -> bool:
    """Whether a run on fake tensors failed because the code needs the tensors' values."""
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return True
    return "Cannot access data pointer" in str(error) or "fake tensor" in str(error).lower()


def storage_key(tensor: torch.Tensor) -> int:
    """A number that two tensors share while both are alive exactly if they are views of one storage."""
    return tensor.untyped_storage()._cdata  # data_ptr() is 0 for every fake tensor


def call_as_written(module: torch.nn.Module) -> None:
    """Undo ``torch.compile`` on a copy of a module, whose compiled call is bound to the module that it was copied from."""
    if module.__dict__.get("_compiled_call_impl") is not None:  # made by module.compile()
        module.__dict__["_compiled_call_impl"] = None
    if type(module).__name__ == "OptimizedModule":  # the wrapper that torch.compile(module) returns
        module.__dict__["forward"] = module._modules["_orig_mod"]
