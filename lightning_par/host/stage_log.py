"""``self.log`` inside a step: recorded for each microbatch on the last stage, folded, and replayed on every rank.

Lightning keeps logged values in a table per rank, and its callbacks read that table on every rank. Under a pipeline only
the last stage has values, once for each microbatch. So while a step runs, ``module.log`` is shadowed by a recorder;
after it the records are folded over microbatches and dp and sent to all stages, and every rank calls the real
``module.log`` with what one process would have logged for the whole batch.

What differs from one process:

- ``sync_dist``, ``sync_dist_group`` and ``rank_zero_only`` change nothing: values are equal on all ranks already.
- ``enable_graph`` changes nothing: values are detached.
- Means are weighted by samples, or by targets where the strategy has a ``loss_weight``; by ``batch_size`` where the call
  gives one. A value without weight anywhere (no target in the whole batch) is logged as 0 and counts nothing in an epoch.
- A torchmetrics object logged with ``on_step`` shows the mean of its values on the microbatches, weighted likewise:
  exact for means over what is counted. What it computes at the end of an epoch is exact for all.
- Only the last stage's calls count. A call guarded by ``if self.global_rank == 0`` is seen when that rank is on it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

import torch
import torch.distributed as dist
from torchmetrics import Metric

from lightning_par.errors import ConfigurationError
from lightning_par.host.last_stage import from_last_stage
from lightning_par.host.stage_metric import StageMetrics
from lightning_par.runtime.mesh import Mesh

# parameters of LightningModule.log after ``name`` and ``value``, in order (Lightning 2.6)
LOG_PARAMETERS = (
    "prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "enable_graph", "sync_dist", "sync_dist_group", "add_dataloader_idx",
    "batch_size", "metric_attribute", "rank_zero_only",
)  # fmt: skip
_PASSED_ON = ("prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx")
_REDUCTIONS = {torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max", sum: "sum", min: "min", max: "max"}


@dataclass
class LogEntry:
    """The calls of one ``self.log`` line in a step: one value and weight for each, or one of each once folded.

    Attributes:
        options: keyword arguments that the replayed call repeats.
        reduction: ``mean``, ``sum``, ``min`` or ``max``.
        metric: attribute name of the torchmetrics object logged; ``None`` for a plain value.
        is_double: whether one process would have kept the value in float64.
        values: 0-dim float64 tensors, floats once sent; of a metric, what its forward returned, if that is one number.
        weights: how much each value counts in a mean.
        sizes: samples behind each value, as one process would tell Lightning.
    """

    options: dict[str, Any]
    reduction: str
    metric: str | None = None
    is_double: bool = False
    values: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def says_same(self, other: LogEntry) -> bool:
        """Whether both come from the same call in everything but the value."""
        return (self.options, self.reduction, self.metric) == (other.options, other.reduction, other.metric)

    def add(self, other: LogEntry) -> None:
        """Take over the values of ``other``."""
        self.values += other.values
        self.weights += other.weights
        self.sizes += other.sizes

    def fold(self) -> None:
        """Reduce to one value and the sum of the weights; the mean is weighted."""
        if not self.values or (len(self.values) == 1 and self.weights[0]):
            return
        stacked = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in self.values])
        if self.reduction == "mean":
            weights = torch.tensor(self.weights, dtype=torch.float64, device=stacked.device)
            stacked = stacked.where(weights > 0, 0.0)  # a mean over no target is undefined
            folded = (stacked * weights).sum() / (sum(self.weights) or 1.0)
        else:
            folded = getattr(torch, self.reduction)(stacked)
        self.values, self.weights, self.sizes = [folded], [sum(self.weights)], [sum(self.sizes)]

    @property
    def batch_size(self) -> int:
        """What Lightning weighs the folded value by in an epoch."""
        return 0 if self.reduction == "mean" and not any(self.weights) else sum(self.sizes)


# Of one microbatch: (name, how many calls with this name came before it)
_Entries = dict[tuple[str, int], LogEntry]


class StageLog:
    """Makes ``self.log`` of a LightningModule work on every rank of a mesh, until `close`.

    Usage, on every rank of the mesh::

        with stage_log.step():
            for index, (microbatch, size) in enumerate(split_batch(batch, num_microbatches)):
                stage_log.begin(index, size)
                module.training_step(microbatch, batch_idx)  # last stage; others may run any part of it

    Not for ``predict_step``, where Lightning allows no logging.
    """

    def __init__(self, module: Any, mesh: Mesh) -> None:
        self._module, self._mesh = module, mesh
        self._metrics = StageMetrics(module, mesh)
        # values are equal on all ranks already, and with one replica Lightning is told of no distribution at all
        warnings.filterwarnings("ignore", r"It is recommended to use `self\.log\(.*sync_dist=True\)`")
        self._records: dict[int, _Entries] = {}
        self.begin(0, 1)

    def begin(self, microbatch: int, size: int, weight: float | None = None, is_last: bool = True) -> None:
        """A stage of this rank begins with a microbatch. What it logs counts where it is the pipeline's last.

        Args:
            microbatch: its index.
            size: samples in it.
            weight: how much its means count; by default ``size``.
            is_last: whether the stage is the last one, on a rank that has it.
        """
        self._metrics.is_muted = not is_last
        self._size, self._weight = size, float(size) if weight is None else weight
        self._calls: dict[str, int] = {}
        self._running: _Entries = {}
        self._records[microbatch] = self._running

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around all microbatches of one ``training_step``, ``validation_step`` or ``test_step``.

        Collective over dp (last stage) and pp when it ends; a step that raises ends at once, with nothing sent.
        """
        with self.recording():
            yield
        entries = _fold(self._records[microbatch] for microbatch in sorted(self._records))
        for (name, _), entry in self._exchange(entries).items():
            self._replay(name, entry)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around all microbatches of a step of which nothing is to be logged. No collective."""
        self._records.clear()
        self.begin(0, 1)
        self._module.log = self._record if self._mesh.is_last_stage else _ignore
        try:
            with self._metrics.local():
                yield
        finally:
            self._metrics.is_muted = False
            del self._module.log

    def close(self) -> None:
        """Undo what was done to the module's torchmetrics objects; when the trainer is done with the module."""
        self._metrics.close()

    def _record(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Stands in for ``module.log`` on the last stage, and on others of its rank."""
        if self._metrics.is_muted:
            return
        options = dict(zip(LOG_PARAMETERS, args, strict=False)) | kwargs
        entry = self._entry(name, value, options)
        call = self._calls[name] = self._calls.get(name, -1) + 1
        self._running[name, call] = entry
        others = (entries[name, call] for entries in self._records.values() if (name, call) in entries)
        if not all(other.says_same(entry) for other in others):
            raise ConfigurationError(
                f"self.log({name!r}, ...) is called with other arguments than for an earlier microbatch of this step: "
                "give it the same ones every time, or use another name"
            )

    def _entry(self, name: str, value: Any, options: dict[str, Any]) -> LogEntry:
        passed_on = {key: options[key] for key in _PASSED_ON if key in options}
        entry = LogEntry(passed_on, _reduction(name, options.get("reduce_fx", "mean")))
        number: Any = value
        if isinstance(value, Metric):
            entry.metric = options.get("metric_attribute") or self._metrics.name_of(value)
            number = value._forward_cache
            if not isinstance(number, torch.Tensor) or number.numel() != 1:
                return entry
        elif not isinstance(value, (torch.Tensor, Number)):
            raise ConfigurationError(
                f"self.log({name!r}, ...): a {type(value).__name__} cannot be logged: pass a number or a Metric"
            )
        elif isinstance(value, torch.Tensor) and value.numel() != 1:
            shape = tuple(value.shape)
            raise ConfigurationError(
                f"self.log({name!r}, ...): a tensor of shape {shape} cannot be logged: reduce it to one number"
            )
        size = options.get("batch_size")
        entry.is_double = _is_double(number)
        entry.values = [_as_double(number)]
        entry.weights = [self._weight if size is None else float(size)]
        entry.sizes = [self._size if size is None else int(size)]
        return entry

    def _exchange(self, entries: _Entries) -> _Entries:
        """The entries that all ranks replay, folded over dp and from the last stage. No collective on one rank."""
        mesh = self._mesh
        if mesh.layout.pp == 1 and mesh.dp.size == 1:
            return entries
        for entry in entries.values():
            entry.values = [float(value) for value in entry.values]
        if mesh.is_last_stage and mesh.dp.size > 1:
            every: list[Any] = [None] * mesh.dp.size
            dist.all_gather_object(every, entries, group=mesh.dp.group)
            entries = _fold(every)
            for entry in entries.values():
                entry.values = [float(value) for value in entry.values]
        return from_last_stage(entries, mesh)

    def _replay(self, name: str, entry: LogEntry) -> None:
        """Call the real ``module.log`` with a folded entry."""
        value: Any = None
        if entry.values:
            dtype = torch.float64 if entry.is_double else torch.float32
            value = torch.as_tensor(entry.values[0], dtype=dtype, device=self._module.device)
        if entry.metric is not None:
            metric = self._module.get_submodule(entry.metric)
            self._metrics.share(metric)
            metric._forward_cache, value = value, metric
        # equal on all ranks already: rank_zero_only keeps Lightning from reducing it, sync_dist from recommending to
        kept = {"sync_dist": True, "rank_zero_only": True, "metric_attribute": entry.metric}
        self._module.log(name, value, reduce_fx=entry.reduction, batch_size=entry.batch_size, **kept, **entry.options)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``module.log`` on the stages before the last."""


def _fold(every: Iterable[_Entries]) -> _Entries:
    """The entries of several microbatches or replicas as one, in the order in which they first appear."""
    folded: _Entries = {}
    for entries in every:
        for key, entry in entries.items():
            if key in folded:
                folded[key].add(entry)
            else:
                folded[key] = entry
    for entry in folded.values():
        entry.fold()
    return folded


def _reduction(name: str, reduce_fx: Any) -> str:
    """The name of a ``reduce_fx``, of which Lightning knows four."""
    reduction = reduce_fx.lower() if isinstance(reduce_fx, str) else _REDUCTIONS.get(reduce_fx, str(reduce_fx))
    reduction = "mean" if reduction == "avg" else reduction
    if reduction not in _REDUCTIONS.values():
        raise ConfigurationError(
            f"self.log({name!r}, reduce_fx={reduce_fx!r}): only mean, sum, min and max are known: log a torchmetrics.Metric instead"
        )
    return reduction


def _is_double(value: Any) -> bool:
    dtype = value.dtype if isinstance(value, torch.Tensor) and value.is_floating_point() else torch.get_default_dtype()
    return dtype == torch.float64


def _as_double(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().to(torch.float64, copy=True).reshape(())
    return torch.tensor(float(value), dtype=torch.float64)
