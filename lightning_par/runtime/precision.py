"""Numeric precision: in which dtype a run computes, and in which it keeps its parameters.

    name          parameters   the user's step computes in      what the optimizer steps   loss scale
    32-true       as they are  their dtype                      the parameters             no
    bf16-mixed    as they are  bfloat16 where autocast says so  the parameters             no
    16-mixed      as they are  float16 where autocast says so   the parameters             yes
    bf16-true     bfloat16     bfloat16                         float32 masters            no

Gradients add up in the dtype of what is stepped. Names and meanings are those of Lightning's ``Trainer(precision=...)``; that
bf16-true has float32 masters is ours (and DeepSpeed's): without them an update that is 2**-8 of a weight is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Precision:
    """What one of the names above means.

    Attributes:
        name: as the user typed it.
        autocast: what autocast computes in; None where there is none.
        parameters: what floating-point parameters, buffers and inputs are cast to; None leaves them as they are.
    """

    name: str
    autocast: torch.dtype | None = None
    parameters: torch.dtype | None = None

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer steps float32 copies of the parameters."""
        return self.parameters is not None

    @property
    def scales_loss(self) -> bool:
        """Whether gradients may be too small for the dtype that they are computed in: float16 ends at 6e-8."""
        return self.autocast is torch.float16

    @contextmanager
    def computing(self, device_type: str) -> Iterator[None]:
        """Around the user's step, not its backward."""
        with self.creating(), self._autocast(device_type):
            yield

    def creating(self) -> AbstractContextManager[None]:
        """Inside, new floating-point tensors have the dtype of the parameters, where no dtype is given."""
        return nullcontext() if self.parameters is None else default_dtype(self.parameters)

    def dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        """What `convert` makes of its dtype."""
        return tensor.dtype if self.parameters is None or not tensor.is_floating_point() else self.parameters

    def convert(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the dtype of the parameters, if it is of floating point; a parameter stays one."""
        if tensor.dtype == self.dtype_of(tensor):
            return tensor
        converted = tensor.detach().to(self.parameters)
        return nn.Parameter(converted, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else converted

    def convert_module(self, module: nn.Module) -> None:
        """Cast a module's parameters and buffers, in place."""
        if self.parameters is not None:
            module.to(dtype=self.parameters)

    def _autocast(self, device_type: str) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        # without its cache, as Lightning: it would keep casts of weights from a forward without gradients for one with
        context: AbstractContextManager[object] = torch.autocast(device_type, self.autocast, cache_enabled=False)
        return context


FULL = Precision("32-true")
PRECISIONS = {
    precision.name: precision
    for precision in (
        FULL,
        Precision("bf16-mixed", autocast=torch.bfloat16),
        Precision("16-mixed", autocast=torch.float16),
        Precision("bf16-true", parameters=torch.bfloat16),
    )
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, ``dtype`` is torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
