"""Functions that compute every element on its own, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_par.runtime.parameter import Split
from lightning_par.tensor.ghost import shielded
from lightning_par.tensor.registry import NoRule, rule_for, spellings
from lightning_par.tensor.rules.operand import aligned_part, first_sharded, has_out, sharded_input, trains_replicated
from lightning_par.tensor.sharded import ShardedTensor

_UNARY = """
abs absolute acos acosh angle asin asinh atan atanh bitwise_not ceil clone conj conj_physical contiguous cos cosh deg2rad detach
digamma erf erfc erfinv exp exp2 expm1 fix floor frac i0 isfinite isinf isnan isneginf isposinf lgamma log log10 log1p log2
logical_not logit nan_to_num neg negative positive rad2deg real reciprocal relu resolve_conj resolve_neg round rsqrt sgn
sigmoid sign signbit sin sinc sinh sqrt square tan tanh trunc zeros_like ones_like empty_like full_like
celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu6 selu silu softplus softshrink softsign
tanhshrink threshold expit
bfloat16 bool byte char cpu cuda double float half int long short
"""

_BROADCASTING = """
add addcdiv addcmul arctan2 atan2 bitwise_and bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor clamp clamp_max
clamp_min clip copysign div divide eq float_power floor_divide fmax fmin fmod ge greater greater_equal gt heaviside hypot
isclose ldexp le lerp less less_equal logaddexp logaddexp2 logical_and logical_or logical_xor lt masked_fill maximum
minimum mul multiply ne nextafter not_equal polar pow remainder rsub sub subtract true_divide where xlogy
"""

_OPERATORS = """
__and__ __eq__ __floordiv__ __invert__ __or__ __pow__ __rand__ __rdiv__ __rfloordiv__ __rlshift__ __rmod__ __ror__ __rpow__
__rrshift__ __rsub__ __rxor__ __xor__ __lshift__ __rshift__ __rtruediv__ __radd__ __rmul__
"""

_IN_PLACE = """
abs_ add_ addcdiv_ addcmul_ ceil_ clamp_ clamp_max_ clamp_min_ clip_ copy_ cos_ detach_ div_ divide_ elu_ eq_ erf_ exp_ fill_ floor_
floor_divide_ fmod_ ge_ gt_ le_ leaky_relu_ lerp_ log_ logical_and_ logical_not_ logical_or_ lt_ masked_fill_ mul_ multiply_ ne_
neg_ pow_ reciprocal_ relu_ remainder_ requires_grad_ round_ rsqrt_ sigmoid_ sin_ sqrt_ square_ sub_ subtract_ tanh_ true_divide_
zero_ __iand__ __ifloordiv__ __ilshift__ __imod__ __ior__ __ipow__ __irshift__ __ixor__
"""

_DIVIDING = set("div divide floor_divide fmod remainder __floordiv__ __rfloordiv__ __mod__ __rmod__".split())


@rule_for(*spellings(_UNARY + _BROADCASTING + _OPERATORS))
def pointwise(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run on the aligned parts; the result is cut where the operands are, counted from the right."""
    values = (*args, *kwargs.values()) if kwargs else args
    lead = first_sharded(values)
    if has_out(kwargs) or (lead.is_padded and _divides_integers(function, lead)):
        raise NoRule
    from_right, segments, axis = lead.shard_dim - len(lead.shape), lead.segments, lead.axis
    is_trained = trains_replicated(lead, values)
    ghosts = 1 if is_trained else None  # at 1 next to no function has an infinite derivative
    parts = [
        lead.local if value is lead and not is_trained else aligned_part(value, from_right, segments, axis, ghosts)
        for value in args
    ]
    named = {name: aligned_part(value, from_right, segments, axis, ghosts) for name, value in kwargs.items()} if kwargs else kwargs
    result = function(*parts, **named)
    if result is lead._local:  # a cast that had nothing to do, or an activation with inplace=True
        return lead
    if not isinstance(result, torch.Tensor):  # where(condition) gives indices
        raise NoRule
    dim = from_right + result.dim()
    return ShardedTensor(shielded(result, Split(dim, segments), axis) if is_trained else result, dim, segments, axis)


def _divides_integers(function: Callable[..., Any], lead: ShardedTensor) -> bool:
    """Whether a ghost of zero could end the process."""
    return not lead.dtype.is_floating_point and function.__name__.rstrip("_") in {name.rstrip("_") for name in _DIVIDING}


@rule_for(*spellings(_IN_PLACE))
def in_place(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Change the local part of the first argument, which must be the sharded one, and give it back."""
    target = sharded_input(args)
    if trains_replicated(target, args[1:]) or first_sharded((*args, *kwargs.values())) is not target:
        raise NoRule
    pointwise(function, args, kwargs)
    target.follow_local()
    return target


@rule_for(*spellings("to type type_as"))
def cast(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Change dtype or device; another tensor only says to which, sharded or not."""
    other = args[1:] and args[1]
    if isinstance(other, ShardedTensor):
        args = (args[0], other.local.detach(), *args[2:])
    if not isinstance(args[0], ShardedTensor):
        return function(*args, **kwargs)
    target = args[0]
    result = function(target.local, *args[1:], **kwargs)
    if result is target._local:
        return target
    return target.rewrap(result) if isinstance(result, torch.Tensor) else result  # x.type() gives a name
