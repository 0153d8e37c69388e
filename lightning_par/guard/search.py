"""A step run again under watch: finds the module where a number stopped being finite.

Nothing here is there while all is well. A step that went wrong is run again by the same executor, with hooks on the modules and,
for a backward, on the nodes of autograd's graph; its random numbers are the same. What counts:

    forward     the first module, in the order of calls, whose output is not finite. An inner module returns before an outer one,
                so that it is the innermost. Minus infinity in a tensor without gradient is a mask, and passes
    backward    the first node that makes a gradient that is not finite of finite ones; the innermost module that made the node
    neither     code before the blocks on a later stage, which computes with placeholders there
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_par.guard.finding import STEP, Cause, Finding
from lightning_par.pipeline.action import Action
from lightning_par.private.torch import place_of
from lightning_par.runtime.nested import paths_in, tensors_in
from lightning_par.runtime.parameter import get_spec, has_spec
from lightning_par.tensor import ShardedTensor


class Search:
    """Watches one rank while it runs a batch; an observer of its executor.

    Args:
        module: the installed module.
        in_backward: whether to look for a gradient, or else for an output.
        place: of the batch among those of the step.
        batches: each microbatch's part; None for one that counts for nothing, whose loss may be undefined.
        bad: names of parameters that are not finite, anywhere.

    Attributes:
        first: what was found.
    """

    def __init__(self, module: nn.Module, in_backward: bool, place: int, batches: list[Any], bad: Iterable[str]) -> None:
        self.first: Finding | None = None
        self._module, self._in_backward, self._place, self._batches, self._bad = module, in_backward, place, batches, set(bad)
        self._action = Action("F", 0, 0)
        self._is_entered = False
        self._callers: list[str] = []
        self._num_seen = 0
        self._owners: dict[Any, str] = {}  # holds the nodes, which are others once they are forgotten

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, calls of the module's submodules are watched, as written: what was compiled is not."""
        with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):
            for name, module in self._module.named_modules():
                if name and not isinstance(module, torch.jit.ScriptModule):
                    handles = (
                        module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True),
                        module.register_forward_hook(partial(self._after, name), with_kwargs=True),
                    )
                    for handle in handles:
                        hooks.callback(handle.remove)
            yield

    # ------------------------------------------------------------------ what the executor says

    def begin(self, action: Action) -> None:
        """An action begins."""
        self._action, self._is_entered, self._num_seen = action, action.stage == 0, 0
        self._callers = []

    def wait(self) -> None:
        """The rank waits for another."""

    def arrive(self) -> None:
        """It goes on."""

    def end(self) -> None:
        """The action has ended."""

    def enter(self) -> None:
        """The blocks of a later stage begin."""
        self._is_entered = True

    def end_step(self, loss: torch.Tensor) -> None:
        """The step ends, on the last stage."""
        self._see(STEP, None, None, loss)

    # ------------------------------------------------------------------ forward

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._action.kind == "F":
            self._own((args, kwargs), self._callers[-1] if self._callers else STEP)
            self._callers.append(name)

    def _after(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._action.kind == "F":
            self._callers.pop()
            self._see(name, module, (args, kwargs), output)

    def _see(self, name: str, module: nn.Module | None, inputs: Any, output: Any) -> None:
        self._own(output, name)
        if not self._is_entered or self._in_backward or self._batches[self._action.microbatch] is None:
            return
        self._num_seen += 1
        if has_bad(output):
            cause, what = self._cause(module, inputs)
            self._note(name, cause, what)

    def _cause(self, module: nn.Module | None, inputs: Any) -> tuple[Cause, str]:
        """Why an output is not finite. A weight that the module borrows from another is in none of its own parameters."""
        own = [get_spec(p).name for p in module.parameters() if has_spec(p)] if module is not None else []
        bad, has_bad_input = [name for name in own if name in self._bad], has_bad(inputs)
        if not bad and not has_bad_input:
            bad = sorted(self._bad)
        if bad:
            return "parameter", bad[0]
        if not has_bad_input:
            return "output", ""
        batch = self._batches[self._action.microbatch]
        parts = [path for path, tensor in zip(paths_in(batch), tensors_in(batch), strict=False) if has_bad(tensor)]
        if parts or (isinstance(batch, torch.Tensor) and has_bad(batch)):
            return "batch", parts[0] if parts else "the tensor"
        return "input", ""

    # ------------------------------------------------------------------ backward

    def _own(self, values: Any, owner: str) -> None:
        """The nodes that ``values`` come from and that are nobody's yet are made by ``owner``."""
        waiting: list[Any] = [tensor.grad_fn for tensor in map(plain, tensors_in(values))] if self._in_backward else []
        while waiting:
            node = waiting.pop()
            if node is not None and node not in self._owners and node.next_functions:  # the ends belong to all microbatches
                following = [each for each, _ in node.next_functions]
                node.register_hook(partial(self._check, owner, node.name(), following))
                self._owners[node] = owner
                waiting += following

    def _check(self, owner: str, operation: str, following: list[Any], given: Any, received: Any) -> None:
        """After a node has run: it received the gradients of its outputs and gave those of its inputs."""
        self._num_seen += 1
        if self.first is not None or self._batches[self._action.microbatch] is None or has_bad(received, masks=False):
            return
        for node, gradient in zip(following, given, strict=False):
            if has_bad(gradient, masks=False):
                parameter: Any = getattr(node, "variable", None)  # a node that ends the graph has one
                is_known = parameter is not None and has_spec(parameter)
                of = f", the gradient of {get_spec(parameter).name}" if is_known else ""
                self._note(owner, "operation", operation + of)
                return

    def _note(self, name: str, cause: Cause, what: str) -> None:
        kind, stage, microbatch = self._action
        order = self._place, microbatch, stage if kind == "F" else -stage, self._num_seen
        finding = Finding(order, name, cause, what, microbatch)
        if self.first is None or finding.order < self.first.order:
            self.first = finding


def has_bad(values: Any, masks: bool = True) -> bool:
    """Whether a tensor in the tree is not finite.

    Args:
        values: the tree.
        masks: whether minus infinity in a tensor without gradient is one of a mask, which is right.
    """
    return any(_is_bad(plain(tensor), masks and not tensor.requires_grad) for tensor in tensors_in(values))


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor that may be in parts."""
    while isinstance(tensor, ShardedTensor):
        tensor = tensor.local if isinstance(tensor.local, ShardedTensor) else tensor.without_ghosts()
    return tensor


def _is_bad(tensor: torch.Tensor, is_mask: bool) -> bool:
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or place_of(tensor) is None:
        return False
    values = tensor.detach()
    return bool((values.isnan() | (values == torch.inf)).any() if is_mask else ~values.isfinite().all())
