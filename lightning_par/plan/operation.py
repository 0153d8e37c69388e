"""Names of torch functions by what they do to the dims of a tensor."""

from __future__ import annotations

from lightning_par.plan.segments import SPLITS
from lightning_par.trace import Op

CASTS = {"to", "float", "half", "bfloat16", "type_as", "contiguous", "clone"}
SHAPE = CASTS | set(
    """view reshape transpose permute swapaxes unsqueeze squeeze expand flatten unflatten split chunk unbind __getitem__ __iter__
    repeat_interleave attribute view_as expand_as narrow select movedim detach""".split()
)
POINTWISE = set(
    """add sub mul div neg pow exp sqrt rsqrt tanh sigmoid gelu silu relu leaky_relu softplus __add__ __radd__ __sub__ __rsub__
    __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __neg__ __iadd__ __imul__ __itruediv__ masked_fill masked_fill_ where
    clamp square abs erf elu mish hardswish relu_ rsub add_ mul_ div_ true_divide""".split()
)
MATRIX = {"matmul", "__matmul__", "bmm", "baddbmm", "scaled_dot_product_attention", "einsum"}
JOINS = {"cat", "concat", "stack"}
ALONG = {"softmax", "log_softmax", "mean", "sum"} | JOINS
OVER_LAST = {"layer_norm", "rms_norm"}
RANDOM = {"dropout", "scaled_dot_product_attention"}
VIEWS = {"view", "reshape", "flatten", "unflatten", "view_as"}
CUTS = SPLITS | {"__getitem__", "narrow", "repeat_interleave"}
KNOWN = SHAPE | POINTWISE | MATRIX | ALONG | OVER_LAST | {"apply", "dropout", "linear"}


def dims_along(op: Op) -> tuple[object, ...]:
    """What an op over some dims (softmax, mean, cat) names as its ``dim``, by position or by name; None where torch chooses."""
    along = op.argument(1, "dim", op.named.get("axis", 0 if op.name in JOINS else None))
    return along if isinstance(along, tuple) else (along,)


def first_normalized_dim(op: Op, ndim: int) -> int:
    """The first of the trailing dims over which a layer or RMS norm of a tensor of ``ndim`` dims computes."""
    normalized = op.argument(1, "normalized_shape")
    return ndim - (len(normalized) if isinstance(normalized, tuple) else 1)
