"""Blocks whose activations are computed again in the backward (arXiv 2205.05198, sections 3 and 5).

    none        autograd keeps all that it needs
    selective   kept are the costly results: products with weights, fused attention, sums over ranks; see `keep`
    full        kept are the inputs of the block

It is torch's checkpointing without reentrant autograd: the backward runs on the graph of the forward, and the first tensor
that it asks a block for runs the block once more, up to the last tensor that is needed. Random generators and autocast are
then as they were. What a block changes besides (its buffers, objects among its arguments) is changed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from lightning_par.plan import Plan
from lightning_par.plan.plan import Recompute
from lightning_par.private.torch import is_compiled
from lightning_par.recompute.arguments import Arguments
from lightning_par.recompute.keep import keeping
from lightning_par.runtime.axis import Axis
from lightning_par.runtime.call import change_call
from lightning_par.runtime.precision import default_dtype


def recompute_blocks(module: nn.Module, plan: Plan, pp: int, tp: Axis) -> None:
    """Change the calls of this rank's blocks to what the plan says of each, in place. Not a collective.

    To be done before the stages are cut: the first block of one is then computed again from the hidden state that was received.

    Args:
        module: the module, its layers converted.
        plan: all decisions.
        pp: this rank's pp coordinate.
        tp: the axis whose sums selective recomputation keeps.
    """
    if plan.chain is None:
        return
    made = dict[Any, type[nn.Module]]()
    for index in plan.blocks_at(pp):
        block, mode = module.get_submodule(plan.chain.blocks[index]), plan.chain.recompute[index]
        if mode != "none":
            as_written = plan.compilation is None and not any(is_compiled(child) for child in block.modules())
            kind = (type(block), mode, as_written)
            if kind in made:
                block.__class__ = made[kind]  # by its class torch.compile knows that it has compiled an equal block
            else:
                change_call(block, _recomputing(*kind, tp))
                made[kind] = type(block)


def _recomputing(cls: type[nn.Module], mode: Recompute, as_written: bool, tp: Axis) -> Callable[..., Any]:
    """The call of a block; ``as_written``: nothing in it is compiled, so that its reads can be watched."""
    contexts = partial(keeping, tp) if mode == "selective" else noop_context_fn

    def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return cls.__call__(block, *args, **kwargs)
        arguments, is_first, dtype = Arguments(args, kwargs, as_written), True, torch.get_default_dtype()

        def run(*tensors: torch.Tensor) -> Any:
            nonlocal is_first
            if is_first:
                is_first = False
                with arguments.first_use() as (args, kwargs):
                    return cls.__call__(block, *args, **kwargs)
            with _buffers_put_back(block), default_dtype(dtype):  # torch puts autocast back, and not this
                args, kwargs = arguments.again(tensors)
                return cls.__call__(block, *args, **kwargs)

        return checkpoint(run, *arguments.take_tensors(), use_reentrant=False, context_fn=contexts)

    return call


@contextmanager
def _buffers_put_back(block: nn.Module) -> Iterator[None]:
    """Inside, the block has copies of its buffers: statistics of a batch norm are not updated a second time.

    All of them: torch does not count an update of running statistics as a change of the tensor.
    """
    held = [(owner, name, buffer) for owner in block.modules() for name, buffer in owner._buffers.items() if buffer is not None]
    for owner, name, buffer in held:
        owner._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for owner, name, buffer in held:
            owner._buffers[name] = buffer
