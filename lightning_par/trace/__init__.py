"""The dry run: the user's step once on fake tensors, recorded as a graph of operations."""

from lightning_par.trace.record import Block, Layer, Op, Output, ParameterInfo, Trace, Value
from lightning_par.trace.tracer import trace_step

__all__ = ["Block", "Layer", "Op", "Output", "ParameterInfo", "Trace", "Value", "trace_step"]
