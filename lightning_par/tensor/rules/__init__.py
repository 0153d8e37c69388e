"""Rules for torch functions on sharded tensors, one module per family. Importing this fills the table."""

from lightning_par.tensor.rules import attention, indexing, loss, matmul, metadata, pieces, pointwise, reduction, shape, stochastic

__all__ = ["attention", "indexing", "loss", "matmul", "metadata", "pieces", "pointwise", "reduction", "shape", "stochastic"]
