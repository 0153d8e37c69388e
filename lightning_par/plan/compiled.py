"""What torch.compile compiles: the largest modules of each block that see nothing but plain tensors.

Layers that are split over tp run as written inside (see `lightning_par.compilation`). Tensors of global shape do too: their
rules are Python that talks to other ranks.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from lightning_par.errors import ConfigurationError
from lightning_par.plan.check import without_blocks
from lightning_par.plan.plan import CompilePlan, Plan
from lightning_par.plan.tensor_rules import Flow
from lightning_par.trace import Op, Trace

_DEFAULT_BACKEND = "inductor"
_WORTH_IT = 2  # operations: one alone is a kernel already


def read_backend(value: Any) -> str | None:
    """The backend of torch.compile that ``compile`` asks for: True is torch's default; None for none.

    Raises:
        ConfigurationError: there is no such backend.
    """
    if value is None or value is False:
        return None
    known = torch.compiler.list_backends(())
    if value is True or value in known:
        return _DEFAULT_BACKEND if value is True else str(value)
    near = difflib.get_close_matches(str(value), known) or torch.compiler.list_backends()
    raise ConfigurationError(
        f"compile={value}: torch.compile has no such backend here: use compile=true for {_DEFAULT_BACKEND}, or {' or '.join(near)}"
    )


def check_compilation(trace: Trace, plan: Plan) -> None:
    """What a compiled block cannot go together with.

    Raises:
        ModelError: there are no blocks.
        ConfigurationError: something in the layout or the plan section that has to see each operation of a block.
    """
    if plan.chain is None:
        raise without_blocks(trace, plan.module, "compile works block by block", "use compile=false")
    if "selective" in plan.chain.recompute:
        raise ConfigurationError(
            "compile with recompute=selective: what is kept is chosen operation by operation, and a compiled block hides them: use "
            "recompute=full, or recompute=none, with which the compiler itself computes cheap operations again"
        )
    if plan.layout.zero == 3:
        raise ConfigurationError(
            f"parallel={plan.layout}: compile with zero3: parameters are there only while their own layer runs, and a compiled "
            "block reads them all at once: use zero2 or compile=false"
        )


def plan_compilation(trace: Trace, plan: Plan, flow: Flow, backend: str) -> tuple[CompilePlan, str]:
    """The modules to compile, and a note for the user.

    Args:
        trace: a dry run, with a chain of blocks.
        plan: with the activations of every layer decided.
        flow: where split activations run.
        backend: of torch.compile.
    """
    blocks = tuple(block.path for block in trace.blocks)
    unfit, num_ops = _unfit(trace, plan, flow), Counter[str]()
    for op in trace.ops:
        if op.layer is None and op.block:
            num_ops.update(_up_to_block(op.module, op.block))
    modules = tuple(path for block in blocks for path in _largest(block, unfit, num_ops))
    return CompilePlan(backend, modules), _note(backend, blocks, modules, plan.layout.tp > 1)


def _unfit(trace: Trace, plan: Plan, flow: Flow) -> frozenset[str]:
    """Modules in which a tensor of global shape is met, and those around them."""
    layers = {layer.name: layer for layer in plan.layers}
    shown = {name for name, layer in layers.items() if layer.kind == "column" and layer.activation == "global"}

    def meets_one(index: int, op: Op) -> bool:
        columns = flow.columns.get(index, frozenset())
        if columns & shown or op.layer in shown:
            return True
        if plan.sequence is None:
            return False
        return not (op.layer is None and columns) and op.module not in plan.sequence.modules  # outside a region they are in parts

    met = ((op.layer or op.module, op.block) for index, op in enumerate(trace.ops) if op.block and meets_one(index, op))
    return frozenset(path for module, block in set(met) for path in _up_to_block(module, block))


def _up_to_block(module: str, block: str) -> list[str]:
    """A module and those around it, up to its block."""
    paths = [module]
    while paths[-1] != block and "." in paths[-1]:
        paths.append(paths[-1].rpartition(".")[0])
    return paths


def _largest(path: str, unfit: frozenset[str], num_ops: Counter[str]) -> Iterator[str]:
    if path not in unfit:
        if num_ops[path] >= _WORTH_IT:
            yield path
        return
    inside = dict.fromkeys(name for name in num_ops if name.startswith(f"{path}.") and "." not in name[len(path) + 1 :])
    for child in inside:
        yield from _largest(child, unfit, num_ops)


def _note(backend: str, blocks: tuple[str, ...], modules: tuple[str, ...], is_split: bool) -> str:
    patterns = ", ".join(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in modules))
    if modules == blocks:
        inside = "; layers that are split over tp run as written inside" if is_split else ""
        return f"torch.compile ({backend}) compiles {patterns}{inside}"
    return (
        f"torch.compile ({backend}) compiles {patterns or 'nothing'}; the rest of the blocks runs as written, because activations "
        "have their global shape there"
    )
