"""Tensor parallelism: layers cut over the tp axis, and tensors between them that keep their global shape."""

from lightning_par.tensor import rules as _rules  # noqa: F401  fills the table of rules
from lightning_par.tensor.embedding import convert_embedding
from lightning_par.tensor.entrance import SharedInput
from lightning_par.tensor.float8 import Float8Arithmetic, check_float8, multiply_in_float8
from lightning_par.tensor.linear import convert_linear, linear_base
from lightning_par.tensor.loss import vocabulary_parallel_cross_entropy
from lightning_par.tensor.sequence import SequenceParallel, convert_positionwise
from lightning_par.tensor.sharded import ShardedTensor, whole_tensor

__all__ = [
    "Float8Arithmetic",
    "SequenceParallel",
    "ShardedTensor",
    "SharedInput",
    "check_float8",
    "convert_embedding",
    "convert_linear",
    "convert_positionwise",
    "linear_base",
    "multiply_in_float8",
    "vocabulary_parallel_cross_entropy",
    "whole_tensor",
]
