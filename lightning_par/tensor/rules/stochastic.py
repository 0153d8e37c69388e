"""Random functions: every rank draws its own numbers for its own part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import functional

from lightning_par.runtime.random import sharded_stream
from lightning_par.tensor.registry import NoRule, rule_for, spellings
from lightning_par.tensor.rules.operand import has_out, sharded_input
from lightning_par.tensor.rules.shape import argument
from lightning_par.tensor.sharded import ShardedTensor

_ELEMENTWISE = """
alpha_dropout bernoulli bernoulli_ cauchy_ dropout dropout_ exponential_ geometric_ log_normal_ normal_
rand_like randint_like randn_like random_ rrelu uniform_
"""


@rule_for(*spellings(_ELEMENTWISE))
def draw(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run on the local part with numbers that differ over the axis."""
    tensor = sharded_input(args)
    if any(isinstance(value, ShardedTensor) for value in args[1:]) or "generator" in kwargs or has_out(kwargs):
        raise NoRule
    if function is functional.dropout and not (argument(args, kwargs, 2, "training", True) and argument(args, kwargs, 1, "p", 0.5)):
        return tensor
    local = tensor.filled(0) if function.__name__ == "bernoulli" else tensor.local  # no probability is left on ghosts
    with sharded_stream(tensor.axis, tensor.device):
        result = function(local, *args[1:], **kwargs)
    return tensor if result is tensor._local else tensor.rewrap(result)
