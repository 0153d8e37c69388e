"""Rules that a module and a batch must keep for a layout, each with what to do when it does not."""

from __future__ import annotations

from lightning_par.errors import DataError, ModelError
from lightning_par.layout import Layout
from lightning_par.plan.segments import OutputUse
from lightning_par.trace import Layer, Trace


def check_chain(trace: Trace, layout: Layout, module: str) -> None:
    """A pipeline or tensor layout needs a chain of blocks, with at least one block for each stage.

    Raises:
        ModelError: none found (names what was looked at and the line that would say it), or too few blocks.
    """
    if layout.model_size == 1 or (layout.pp == 1 and trace.layers and not trace.chains_seen and trace.blocks):
        return
    if layout.pp > 1 and not trace.blocks:
        looked = "; ".join(f"{name or module}: {reason}" for name, reason in trace.chains_seen) or "no ModuleList or Sequential at all"
        raise ModelError(
            f"parallel={layout} needs a chain of blocks, and {module} has none that the step runs in order (looked at {looked}): "
            f"name the container of the blocks with plan.chain=PATH"
        )
    if layout.pp > max(1, trace.num_blocks):
        raise ModelError(
            f"parallel={layout} asks for {layout.pp} stages, and {trace.chain} has {trace.num_blocks} blocks: every stage needs one, "
            f"use pp{trace.num_blocks} or less"
        )


def check_crossings(trace: Trace) -> None:
    """Between stages only the hidden state travels; all else that a later stage reads must be computable there.

    Raises:
        ModelError: a block reads something that depends on parameters of another stage, or returns several tensors that
            later code reads, or the hidden state changes its shape on the way.
    """
    for op in trace.ops:
        arrives = trace.blocks[op.phase // 2].carry_in if op.phase % 2 else None
        for number in op.inputs:
            value = trace.values[number]
            foreign = value.phase >= 0 and trace.block_of(value.phase) != trace.block_of(op.phase)
            if foreign and value.depends_on_parameters and number != arrives:
                raise ModelError(
                    f"{op.module or 'the step'} ({op.name}) reads a tensor of shape {list(value.shape)} that was computed with parameters "
                    f"{_phase_name(trace, value.phase)}: between pipeline stages only the hidden state of the blocks travels. Use pp1, or "
                    f"compute it inside the block that reads it"
                )
    for block in trace.blocks:
        if block.extra_outputs:
            raise ModelError(
                f"{block.path} returns {1 + len(block.extra_outputs)} tensors that later code reads: between pipeline stages only the hidden "
                f"state travels. Use pp1, or return one tensor"
            )
        came, left = trace.values[block.carry_in].shape, trace.values[block.carry_out].shape
        if came != left:
            raise ModelError(
                f"{block.path} turns a hidden state of shape {list(came)} into {list(left)}: a pipeline needs blocks that keep the shape. Use pp1"
            )


def check_divides(layer: Layer, use: OutputUse, tp: int, what: str) -> None:
    """Every head and every fused part of a split layer has an equal share for each tp rank.

    Raises:
        ModelError: with the tp sizes that work.
    """
    heads = [count for count in use.heads if count]
    for sizes, unit in ((heads, "heads"), (list(use.segments), what)):
        bad = next((size for size in sizes if size % tp), None)
        if bad is not None:
            working = [t for t in range(1, bad + 1) if all(size % t == 0 for size in (*heads, *use.segments))]
            raise ModelError(
                f"tp{tp}: {layer.name} has {bad} {unit}, which {tp} tensor-parallel ranks cannot share equally: "
                f"use tp {', '.join(map(str, working[:8]))}, or keep it whole with plan.split.\"{layer.name}\"=replicate"
            )


def resolve_microbatches(layout: Layout, batch_size: int) -> int:
    """Microbatches of a batch: as the layout says, else twice the stages or the next smaller number that divides the batch.

    Raises:
        DataError: the layout's number does not divide the batch.
    """
    divisors = [count for count in range(1, batch_size + 1) if batch_size % count == 0]
    if layout.microbatches is None:
        return 1 if layout.pp == 1 else max(count for count in divisors if count <= 2 * layout.pp)
    if layout.microbatches not in divisors:
        raise DataError(
            f"parallel={layout}: a batch of {batch_size} samples does not split into {layout.microbatches} equal microbatches: "
            f"use mb {', '.join(map(str, divisors))}, or another batch size"
        )
    return layout.microbatches


def _phase_name(trace: Trace, phase: int) -> str:
    if phase == 0:
        return "before the blocks"
    return f"in {trace.blocks[phase // 2].path}" if phase % 2 else "between or after the blocks"
