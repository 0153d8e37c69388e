"""Which values of a step are the hidden state, made from the samples of the batch by parameters."""

from __future__ import annotations

from lightning_par.trace import Trace


def hidden_values(trace: Trace) -> frozenset[int]:
    """Numbers of the values that hold the hidden state, or anything computed from it.

    It begins where a parameter meets the batch, and at the first block. Others that depend on parameters are tables, such as
    relative position biases and scaled norm weights: they depend on the batch by masks alone. An unknown function (a value
    that no operation made) counts as reading the hidden state.
    """
    hidden = {block.carry_in for block in trace.blocks}
    batch = {number for number, value in enumerate(trace.values) if value.is_batch}
    made: set[int] = set()
    for op in trace.ops:
        hidden.update(n for n in op.inputs if n not in made and trace.values[n].depends_on_parameters)
        if not hidden.isdisjoint(op.inputs) or (op.parameters and not batch.isdisjoint(op.inputs)):
            hidden.update(op.outputs)
        if not batch.isdisjoint(op.inputs):
            batch.update(op.outputs)
        made.update(op.outputs)
    return frozenset(hidden)
