"""Gradients reduced over dp while a backward makes them, so that a rank keeps 1/dp of them and one bucket.

Of Ψ gradient elements a rank keeps Ψ/dp between microbatches instead of Ψ, and they are sent once for each microbatch instead
of once for each step. While a backward runs, DeepSpeed's buckets come on top, and in stage 2 another Ψ/dp. A gradient that is a
sum over tp, over the ranks that hold copies, or over tied stages is summed first, which is done once for each step: it stays
whole until then.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_par.private.deepspeed import ZeroEngine
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.parameter import ParameterSpec, get_spec


class EarlyReduction:
    """Hooks on the parameters of one rank.

    Every dp rank must use the same parameters in each microbatch: what is in a bucket follows from the order of gradients.

    Args:
        engine: who reduces.
        parameters: those that are trained.
        mesh: the mesh of the run.
    """

    def __init__(self, engine: ZeroEngine, parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
        self._engine = engine
        waits = {parameter: is_late(get_spec(parameter), mesh.tp.size) for parameter in parameters}
        self._late = [parameter for parameter, late in waits.items() if late]
        early = [parameter for parameter, late in waits.items() if not late]
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._reduce) for parameter in early]
        self._taken: set[nn.Parameter] = set()  # in this backward
        self._is_open = False

    def after_backward(self) -> None:
        """Reduce the rest of what this backward has made. Collective over dp."""
        if self._taken:
            self._engine.close_early(self._late)
            self._taken.clear()

    def finish(self) -> None:
        """Reduce what was left for the end of the step. Collective over dp."""
        self._open()
        self._engine.flush_late()

    def forget(self) -> None:
        """The next gradient begins another step."""
        self._taken.clear()
        self._is_open = False

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._late = [], []

    def _reduce(self, parameter: nn.Parameter) -> None:
        self._open()
        if parameter in self._taken:  # reentrant checkpointing runs a backward inside the backward
            self.after_backward()
        self._taken.add(parameter)
        self._engine.reduce_early(parameter)

    def _open(self) -> None:
        if not self._is_open:
            self._engine.open_early()
            self._is_open = True


def is_late(spec: ParameterSpec, tp: int) -> bool:
    """Whether the gradient of a parameter stays whole until the end of a step: several ranks of a replica hold parts that add up.

    Args:
        spec: of the parameter.
        tp: ranks on that axis.
    """
    has_copies = spec.split is not None and any(count > 1 for count in spec.split.copies)
    return len(spec.stages) > 1 or has_copies or (spec.partial and tp > 1)
