"""Caches of keys and values where a rank passes over a block.

A cache of transformers has a layer for each block, and the code before the blocks asks the first one how many tokens it has
seen, whatever rank that block is on. So a rank that passes over a block lets its layer grow by as many tokens as the
block would, by keys of one head and one feature.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from lightning_par.runtime.nested import children


def keep_length(block: nn.Module, hidden: torch.Tensor, arguments: Any) -> None:
    """Let the layers of a passed-over block grow in every transformers cache among its arguments.

    Args:
        block: the block, whose attention modules say by ``layer_idx`` which layers are theirs.
        hidden: ``[batch, tokens, ...]``.
        arguments: of its call.
    """
    module = sys.modules.get("transformers.cache_utils")
    caches = [] if module is None else [leaf for leaf in _leaves(arguments) if isinstance(leaf, module.Cache)]
    for cache in {id(cache): cache for cache in caches}.values():
        for layer in sorted({index for child in block.modules() if isinstance(index := vars(child).get("layer_idx"), int)}):
            keys = hidden.new_zeros((hidden.shape[0], 1, hidden.shape[1], 1))
            cache.update(keys, keys, layer)


def _leaves(node: Any) -> list[Any]:
    pairs = children(node)
    return [node] if pairs is None else [leaf for _, child in pairs for leaf in _leaves(child)]
