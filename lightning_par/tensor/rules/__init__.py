"""Rules for torch functions on sharded tensors, one module per family. Importing this fills the table."""

from lightning_par.tensor.rules import (
    along_cut,
    attention,
    indexing,
    loss,
    matmul,
    metadata,
    pieces,
    pointwise,
    reduction,
    shape,
    stochastic,
)

__all__ = [
    "along_cut",
    "attention",
    "indexing",
    "loss",
    "matmul",
    "metadata",
    "pieces",
    "pointwise",
    "reduction",
    "shape",
    "stochastic",
]
