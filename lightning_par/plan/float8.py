"""Which linear layers multiply in float8: those of the blocks whose weight, on each rank, has sides that float8 units take.

What is before and behind the blocks, the head above all, stays as it is, as torchao recommends: little time goes there, and
rounding costs most.
"""

from __future__ import annotations

import re

from lightning_par.errors import ConfigurationError
from lightning_par.plan.check import without_blocks
from lightning_par.plan.plan import Float8Plan, Float8Recipe, LayerPlan, Plan
from lightning_par.runtime.parameter import Split
from lightning_par.trace import Layer, Trace

_SIDE = 16  # elements: both sides of a weight are multiples of it (torch._scaled_mm)


def plan_float8(trace: Trace, plan: Plan, recipe: Float8Recipe) -> tuple[Float8Plan, str]:
    """The layers that multiply in float8, and a note for the user.

    Raises:
        ModelError: there are no blocks.
        ConfigurationError: no layer in them can, or the plan section asks for what has to know the products.
    """
    if plan.chain is None:
        raise without_blocks(trace, plan.module, f"fp8={recipe} is for the linear layers of the blocks", "leave fp8 out")
    if "selective" in plan.chain.recompute:
        raise ConfigurationError(
            f"fp8={recipe} with recompute=selective: that keeps the results of torch's own products, and float8 ones are others: "
            "use recompute=full, or recompute=none"
        )
    inside = tuple(f"{path}." for path in plan.chain.blocks)
    layers = [layer for layer in trace.layers.values() if layer.kind != "embedding" and layer.name.startswith(inside)]
    fits = {
        layer.name: all(side % _SIDE == 0 for side in _sides(layer, plan.layer(layer.name), plan.layout.tp)) for layer in layers
    }
    chosen = tuple(name for name, is_fit in fits.items() if is_fit)
    if not chosen:
        raise ConfigurationError(
            f"fp8={recipe}: no linear layer in the blocks of {plan.module} has a weight, on each of tp={plan.layout.tp} ranks, "
            f"whose sides are multiples of {_SIDE}: use a smaller tp, or leave fp8 out"
        )
    left = sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name, is_fit in fits.items() if not is_fit})
    words = f"; not {', '.join(left)}, whose sides are no multiples of {_SIDE} on each rank" if left else ""
    return Float8Plan(recipe, chosen), f"float8 ({recipe}) in {len(chosen)} linear layers of the blocks{words}"


def _sides(layer: Layer, plan: LayerPlan | None, tp: int) -> tuple[int, int]:
    """Inputs and outputs of a layer on one rank."""
    inputs, outputs = layer.in_size, layer.out_size
    if plan is not None and plan.kind == "row":
        inputs = -(-inputs // tp)
    if plan is not None and plan.kind == "column":
        outputs = sum(Split(0, plan.segments or (outputs,), plan.copies).local_segments(tp))
    return inputs, outputs
