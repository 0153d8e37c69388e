"""torchmetrics objects that only the last pipeline stage updates: the same ``compute()`` on every rank.

Stock torchmetrics gathers states over the world. Here the world holds tp copies of every update and, on all stages but
the last, none at all. So the states are gathered over dp (where the samples differ), on the last stage, and the value
computed there is sent to the other stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_par.errors import ConfigurationError, ReplicaError
from lightning_par.host.last_stage import from_last_stage
from lightning_par.runtime.mesh import Mesh


class StageMetrics:
    """Shares the torchmetrics objects of a module between the ranks of a mesh, until `close`.

    A metric's ``compute()`` becomes a collective over its dp and pp groups: all ranks call it, in the same order, as
    Lightning does at the end of an epoch. ``reset()`` stays local. Inside `local` only this rank's states count.

    Attributes:
        is_muted: whether updates are left out: an earlier stage of a rank that has the last one too is running.
    """

    def __init__(self, module: nn.Module, mesh: Mesh) -> None:
        self._module, self._mesh = module, mesh
        self._is_local = False
        self.is_muted = False
        self._shared: dict[int, tuple[Metric, dict[str, Any]]] = {}
        for metric in module.modules():
            if isinstance(metric, Metric):
                self.share(metric)

    def name_of(self, metric: Metric) -> str:
        """Attribute of the module under which all ranks find ``metric``. Raises ConfigurationError if there is none."""
        for name, candidate in self._module.named_modules():
            if candidate is metric:
                return name
        raise ConfigurationError(
            f"a {type(metric).__name__} was logged that is no attribute of {type(self._module).__name__}, so that other pipeline "
            "stages cannot find theirs: assign it to self in __init__ (a list of metrics as nn.ModuleList, a dict as nn.ModuleDict)"
        )

    def share(self, metric: Metric) -> None:
        """Share one metric; again is no harm. A ``dist_sync_fn`` that the user gave it stays."""
        if id(metric) in self._shared:
            return
        names = ("compute", "update", "forward", "dist_sync_fn")
        self._shared[id(metric)] = (metric, {name: getattr(metric, name) for name in names})
        dp_group = self._mesh.dp.group

        def gather(state: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
            # a closure, because ``metric.clone()`` cannot copy a ``process_group`` attribute
            return gather_all_tensors(state, group=group or dp_group)

        ours: dict[str, Any] = {"dist_sync_fn": metric.dist_sync_fn or gather}
        if self._mesh.pp.size > 1:
            ours["compute"] = self._computed_on_last_stage(metric, metric.compute)
        if self._mesh.layout.vp > 1:
            ours |= {name: self._unless_muted(getattr(metric, name)) for name in ("update", "forward")}
        for name, function in ours.items():
            setattr(metric, name, function)

    @contextmanager
    def local(self) -> Iterator[None]:
        """While entered, ``compute()`` is torchmetrics' own: the forward of a metric calls it on the last stage alone."""
        before, self._is_local = self._is_local, True
        try:
            yield
        finally:
            self._is_local = before

    def close(self) -> None:
        """Give all metrics their own functions back."""
        for metric, own in self._shared.values():
            for name, function in own.items():
                setattr(metric, name, function)
        self._shared.clear()

    def _unless_muted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.zeros(()) if self.is_muted else function(*args, **kwargs)

        return call

    def _computed_on_last_stage(self, metric: Metric, compute: Callable[..., Any]) -> Callable[..., Any]:
        def shared_compute(*args: Any, **kwargs: Any) -> Any:
            if self._is_local:
                return compute(*args, **kwargs)
            value, failure = None, None
            if self._mesh.is_last_stage:
                try:
                    with self.local():  # a wrapper metric calls the compute of those inside it
                        value = apply_to_collection(compute(*args, **kwargs), torch.Tensor, lambda tensor: tensor.detach().cpu())
                except Exception as error:
                    failure = error
            value, reason = from_last_stage((value, failure and repr(failure)), self._mesh)
            if reason is not None:
                raise failure or ReplicaError(f"{type(metric).__name__}.compute() failed on the last pipeline stage: {reason}")
            return apply_to_collection(value, torch.Tensor, lambda tensor: tensor.to(metric.device))

        return shared_compute
