"""Which optimizers may step flat pieces of parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_par.errors import ConfigurationError
from lightning_par.zero.twin import hyperparameters, twin_of

# on a flat piece of many parameters these would compute something else, or DeepSpeed rebuilds them without their groups
NOT_ELEMENTWISE = ("Adafactor", "Muon", "LBFGS", "SparseAdam", "Adagrad")
_SIZE, _STEPS, _TOLERANCE = (4, 6), 3, 1e-5  # kernels may round a long tensor and its pieces differently


def check_optimizer(stage: int, optimizers: Sequence[Optimizer]) -> None:
    """Check that there is one optimizer, whose update of an element reads that element alone.

    Whether it does so is tried out on a small tensor: whole, and in flat pieces.

    Raises:
        ConfigurationError: there are several, or it does not.
    """
    if len(optimizers) != 1:
        raise ConfigurationError(f"zero{stage} steps one optimizer, configure_optimizers gave {len(optimizers)}: use zero0")
    ancestors = [cls.__name__ for cls in type(optimizers[0]).__mro__]
    if any(name in ancestors for name in NOT_ELEMENTWISE) or not _is_elementwise(optimizers[0]):
        raise ConfigurationError(
            f"zero{stage} steps flat pieces of parameters, and {type(optimizers[0]).__name__} needs whole ones: "
            "use zero0, or an elementwise optimizer such as AdamW"
        )


def _is_elementwise(optimizer: Optimizer) -> bool:
    """Whether a matrix and the same numbers in two flat pieces are stepped alike. True where it cannot be tried."""
    torch_state = torch.random.get_rng_state()
    try:
        generator = torch.Generator().manual_seed(0)
        weight, *gradients = torch.randn(1 + _STEPS, *_SIZE, generator=generator)
        gradients[-1] *= 10  # where a norm or a maximum decides, it decides differently
        try:
            (whole,) = _step(optimizer, [weight], [[each] for each in gradients]).values
        except Exception:  # wants a device, a closure or names of its own
            return True
        halves = [weight.flatten()[:7], weight.flatten()[7:]]
        try:
            parts = _step(optimizer, halves, [[each.flatten()[:7], each.flatten()[7:]] for each in gradients]).values
        except Exception:
            return False
        return torch.allclose(torch.cat(parts), whole.flatten(), rtol=_TOLERANCE, atol=_TOLERANCE)
    finally:
        torch.random.set_rng_state(torch_state)


def kept_states(optimizer: Optimizer) -> list[str]:
    """The names of what an optimizer keeps for each element, read off steps of a small tensor.

    Raises:
        ConfigurationError: these could not be in files, which hold float32 numbers that steps change in place.
    """
    torch_state = torch.random.get_rng_state()
    try:
        trial = _step(optimizer, [torch.ones(_SIZE)], [[torch.ones(_SIZE)]] * _STEPS)
    except Exception as error:
        raise ConfigurationError(
            f"zero.offload_optimizer=nvme: {type(optimizer).__name__} cannot be tried out on the host ({error}): use cpu"
        ) from error
    finally:
        torch.random.set_rng_state(torch_state)
    size = math.prod(_SIZE)
    kept = [
        {key: each for key, each in state.items() if isinstance(each, Tensor) and each.numel() == size} for state in trial.states
    ]
    for name, tensor in kept[-1].items():
        if tensor is not kept[0].get(name) or tensor.dtype is not torch.float32:
            raise ConfigurationError(
                f"zero.offload_optimizer=nvme: files are for float32 numbers that each step changes in place, and "
                f"{type(optimizer).__name__} does not keep its state {name} so: use cpu"
            )
    return list(kept[-1])


class _Trial(NamedTuple):
    """What became of values that an optimizer stepped, and what it kept of the first one after each step."""

    values: list[Tensor]
    states: list[dict[str, Any]]


def _step(optimizer: Optimizer, values: list[Tensor], gradients: list[list[Tensor]]) -> _Trial:
    parameters = [nn.Parameter(value.clone()) for value in values]
    settings = copy.deepcopy(hyperparameters(optimizer.param_groups[0]))
    twin = twin_of(optimizer, [{**settings, "params": parameters}])
    states = []
    torch.random.manual_seed(0)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        twin.step()
        states.append(dict(twin.state[parameters[0]]))
    return _Trial([parameter.detach() for parameter in parameters], states)
