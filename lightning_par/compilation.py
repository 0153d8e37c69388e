"""Blocks that torch.compile compiles, as the plan says.

The layers that are split over tp stay out of the graphs (``runs_as_written`` on their forwards): readers of one tensor share
one gradient reduction, which runs while their weight gradients are computed ([Note: overlap] in
`lightning_par.tensor.entrance`), and the nodes of a compiled graph keep neither. A block of the main job's GPT has 6 graphs
then, one of transformers' Llama 8; equal blocks share them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from lightning_par.plan import Plan
from lightning_par.private.torch import allow_versions, is_compiled
from lightning_par.tensor.sequence import compile_positionwise

_VERSIONS = 8  # of one graph besides those of the blocks: grad mode, shapes; torch's own limit


def compile_modules(module: nn.Module, plan: Plan, pp: int) -> None:
    """Let the planned modules of this rank's blocks be compiled when they are first called, in place. Not a collective.

    What the user has compiled stays so. Nothing is compiled here: blocks may still be given calls of their own around it.
    """
    if plan.compilation is None or plan.chain is None:
        return
    compilation, held = plan.compilation, [plan.chain.blocks[index] for index in plan.blocks_at(pp)]
    allow_versions(len(held) + _VERSIONS)  # code that reads the number of its block has a version for each
    for path in compilation.modules:
        child = module.get_submodule(path)
        if not any(path == block or path.startswith(f"{block}.") for block in held) or is_compiled(child):
            continue
        if plan.sequence is not None and path in plan.sequence.modules:
            compile_positionwise(child, partial(torch.compile, backend=compilation.backend))
        else:
            child.compile(backend=compilation.backend)
