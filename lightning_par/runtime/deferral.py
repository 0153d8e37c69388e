"""Weight gradients that are left for later, so that the gradient of a stage's input is there early.

The backward of a linear layer is two products of equal cost, and only one of them is waited for by the stage before
(arXiv 2401.10241, section 2). The actions of a schedule::

    B   backward as it is
    I   backward in which layers only note what the gradients of their weights are made of
    W   those products, added to ``p.grad``

The graph of autograd is gone after I. Whatever no layer notes (norms, embeddings, parameters read by the user's own code) has
its gradient in I already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import nn

from lightning_par.runtime.arithmetic import AS_GIVEN, Arithmetic

Key: TypeAlias = tuple[int, int]  # stage, microbatch


class Note(NamedTuple):
    """What the gradients of a linear layer are made of.

    Attributes:
        weight: ``[out, in]``, or ``[in, out]`` if transposed.
        bias: ``[out]``; None where it has no gradient, or is none.
        x: the input ``[..., in]``.
        y: the gradient of the output ``[..., out]``.
        transposed: how the weight lies.
        arithmetic: how the layer multiplies.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    x: torch.Tensor
    y: torch.Tensor
    transposed: bool
    arithmetic: Arithmetic = AS_GIVEN

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the weight, by the product that autograd would run, and of the bias."""
        x, y = self.x.reshape(-1, self.x.shape[-1]), self.y.reshape(-1, self.y.shape[-1])
        return self.arithmetic.weight_gradient(x, y, self.transposed), self.of_bias()

    def of_bias(self) -> torch.Tensor | None:
        return None if self.bias is None else self.y.reshape(-1, self.y.shape[-1]).sum(0)


class DeferredGradients:
    """The notes of one rank, from action I to action W. Layers hold the object that they were installed with."""

    def __init__(self) -> None:
        self._kept: dict[Key, deque[Note]] = {}
        self._collected: deque[Note] | None = None

    @contextmanager
    def collecting(self, key: Key) -> Iterator[None]:
        """Around the backward of action I. A backward that fails leaves no notes."""
        assert self._collected is None, f"the backward of {key} runs inside another"
        self._collected = self._kept[key] = deque()  # what an unfinished step has left of this key is nothing
        try:
            yield
        except BaseException:
            del self._kept[key]
            raise
        finally:
            self._collected = None

    @property
    def is_collecting(self) -> bool:
        """Whether an action I is running."""
        return self._collected is not None

    def note(self, note: Note) -> None:
        """Keep a note for action W. Its tensors must not be changed in place until then."""
        assert self._collected is not None
        self._collected.append(note)

    @torch.no_grad()
    def run(self, key: Key) -> None:
        """Action W, after action I of the same key: add up in ``p.grad``, in the order noted, and drop each note."""
        notes = self._kept.pop(key)
        while notes:
            weight, bias, *_ = note = notes.popleft()
            of_weight, of_bias = note.gradients()
            _accumulate(weight, of_weight)
            if bias is not None and of_bias is not None:
                _accumulate(bias, of_bias)

    def forget(self) -> None:
        """Drop all notes, after a step that failed."""
        self._kept.clear()


def _accumulate(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
    """Add to ``p.grad`` as autograd does: in its dtype; the first one is taken over, and lies in memory as the parameter."""
    if parameter.grad_dtype is not None:
        gradient = gradient.to(parameter.grad_dtype)
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
    elif gradient.stride() == parameter.stride():
        parameter.grad = gradient
    else:
        parameter.grad = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
