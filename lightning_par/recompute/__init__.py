"""Activations that are computed again in the backward instead of being kept, block by block."""

from lightning_par.recompute.block import recompute_blocks

__all__ = ["recompute_blocks"]
