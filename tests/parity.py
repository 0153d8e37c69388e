"""The parity harness: the same module trained in one process and in a layout must give the same run.

Compared are the losses, every gradient of the first step, the global gradient norm of every step, and all weights after
three AdamW steps with clipping, in fp32, each tensor to a relative 1e-5. Global tensors are put together here, from what
every rank holds, by the sizes in the plan alone: neither the reductions nor the checkpoint code is trusted with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_par.host.strategy import HybridParallelStrategy
from lightning_par.layout import Layout, parse_layout
from lightning_par.runtime.nested import map_tensors
from lightning_par.runtime.parameter import ParameterSpec, get_spec
from tests.models import make_batch
from tests.ranks import DEVICE, in_one_process, machines, run_ranks

STEPS, REPLICA_BATCH, CLIP, TOLERANCE = 3, 8, 0.3, 1e-5
MakeModel = Callable[[], pl.LightningModule]
MakeBatch = Callable[[int, int], dict[str, torch.Tensor]]


@dataclass
class Run:
    """What one process, or one rank of a layout, saw.

    Attributes:
        losses, norms: of each step.
        gradients: of the first step, before any reduction.
        weights: in the end.
        specs: of each parameter.
        scales: the loss scale after each step, where there is one.
        pieces: what a rank holds of the reduced gradients of the first step: name, tp coordinate, where it begins, values.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    specs: dict[str, ParameterSpec] = field(default_factory=dict)
    scales: list[float] = field(default_factory=list)
    pieces: list[tuple[str, int, int, torch.Tensor]] = field(default_factory=list)


class Steps(Dataset[dict[str, torch.Tensor]]):
    """Whole batches by step: the global batch, or the part of one replica."""

    def __init__(self, dp_size: int, dp_rank: int | None = None, make: MakeBatch = make_batch) -> None:
        self.dp_size, self.dp_rank, self.make = dp_size, dp_rank, make

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        if step >= STEPS:
            raise IndexError(step)
        batch = self.make(step, REPLICA_BATCH * self.dp_size)
        if self.dp_rank is None:
            return batch
        part = slice(self.dp_rank * REPLICA_BATCH, (self.dp_rank + 1) * REPLICA_BATCH)
        cut: dict[str, torch.Tensor] = map_tensors(lambda tensor: tensor[part], batch)
        return cut


class Watch(pl.Callback):
    """Writes down a run."""

    def __init__(self) -> None:
        self.run = Run()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            named = pl_module.named_parameters()
            self.run.gradients = {name: kept(p.grad) for name, p in named if p.grad is not None}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, HybridParallelStrategy):
            if trainer.global_step == 0:
                self.run.pieces = [
                    (get_spec(each.parameter).name, strategy.mesh.coordinate.tp, each.start, kept(each.gradient))
                    for each in strategy.states.gradients()
                ]
        else:
            norms = torch.stack([p.grad.double().norm() for p in pl_module.parameters() if p.grad is not None])
            self.run.norms.append(float(norms.norm()))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.run.losses.append(float(outputs["loss"]))
        if isinstance(trainer.strategy, HybridParallelStrategy) and trainer.strategy.grad_norm is not None:  # a step was taken
            self.run.norms.append(float(trainer.strategy.grad_norm))
            scale = trainer.strategy.engine.loss_scale
            self.run.scales += [] if scale is None else [scale.scale]


def fit(
    make: MakeModel,
    loader: DataLoader[Any],
    callbacks: Sequence[pl.Callback] = (),
    ckpt_path: str | None = None,
    **trainer: Any,
) -> tuple[pl.Trainer, pl.LightningModule, Run]:
    """Train a freshly made model, without anything that writes."""
    torch.manual_seed(0)
    module, watch = make(), Watch()
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"), False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen: dict[str, Any] = {"accelerator": DEVICE, "max_steps": STEPS, "gradient_clip_val": CLIP, **quiet, **trainer}
        host = pl.Trainer(callbacks=[watch, *callbacks], **chosen)
        host.fit(module, loader, ckpt_path=ckpt_path)
    return host, module, watch.run


def train_alone(make: MakeModel, dp_size: int) -> Run:
    """The run in one process, on the batches of all replicas together."""
    _, module, run = fit(make, DataLoader(Steps(dp_size), batch_size=None), devices=1)
    run.weights = {name: kept(p) for name, p in module.named_parameters()}
    return run


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host."""
    return tensor.detach().to("cpu", copy=True)


def train_rank(
    make: MakeModel, layout: Layout, rank: int, trainer: Mapping[str, Any] | None = None, **strategy_options: Any
) -> Run:
    """One rank's view of the run in a layout. Collective over the world."""
    strategy = HybridParallelStrategy(layout, print_plan=False, **strategy_options)
    loader: DataLoader[Any] = DataLoader(Steps(layout.dp or 1, layout.coordinate_of(rank).dp), batch_size=None)
    _, module, run = fit(make, loader, strategy=strategy, **{**machines(layout.world_size), **(trainer or {})})
    run.weights = {name: kept(value) for name, value in strategy.states.full_parameters()}
    run.specs = {name: get_spec(p) for name, p in module.named_parameters()}
    strategy.states.close()
    return run


def check_parity(
    makers: Mapping[str, MakeModel],
    word: str,
    timeout: float = 120,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **strategy_options: Any,
) -> dict[str, float]:
    """Train every model alone and in the layout ``word``, all in one start of its ranks, and compare.

    Args:
        makers: models by name.
        word: the layout.
        timeout: seconds for all models together.
        options: what the strategy is given for single models.
        **strategy_options: what it is given for all of them, besides the layout.

    Returns:
        The largest relative error of each model, of all that is compared.

    Raises:
        AssertionError: names the model, what differs, by how much.
    """
    layout = parse_layout(word)
    layout = layout.resolve(layout.world_size)
    chosen = {name: {**strategy_options, **(options or {}).get(name, {})} for name in makers}
    results = run_ranks(_all_models, layout.world_size, makers, layout, chosen, timeout=timeout)
    errors = {}
    runs = in_one_process(_all_alone, makers, layout.dp or 1)
    for name, alone in runs.items():
        ranks = [result[name] for result in results]
        try:
            errors[name] = compare(alone, ranks, layout)
        except AssertionError as error:
            raise AssertionError(f"{name} in {word}: {error}") from None
    return errors


def _all_alone(makers: Mapping[str, MakeModel], dp_size: int) -> dict[str, Run]:
    return {name: train_alone(make, dp_size) for name, make in makers.items()}


def _all_models(
    rank: int, world_size: int, makers: Mapping[str, MakeModel], layout: Layout, options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Run]:
    return {name: train_rank(make, layout, rank, **options[name]) for name, make in makers.items()}


def compare(alone: Run, ranks: list[Run], layout: Layout, allowed: Mapping[str, float] | None = None) -> float:
    """The largest relative error of the ranks' views of a run against the run in one process, none more than the tolerance.

    Args:
        alone: the run in one process.
        ranks: what each rank saw.
        layout: theirs.
        allowed: the tolerance for each field of `Run`, where it is not the usual one.
    """
    errors, allowed = [], allowed or {}
    for rank, run in enumerate(ranks):
        for what in ("losses", "norms"):
            ours, theirs = torch.tensor(getattr(run, what)), torch.tensor(getattr(alone, what))
            errors.append(_close(f"{what} on rank {rank}", ours, theirs, allowed.get(what, TOLERANCE)))
    for what, total in (("gradients", True), ("weights", False)):
        whole, expected = dict(assemble(ranks, layout, what, total)), getattr(alone, what)
        assert whole.keys() == expected.keys(), f"{what} of {sorted(whole.keys() ^ expected.keys())} are on one side only"
        tolerance = allowed.get(what, TOLERANCE)
        errors += [_close(f"{what}[{name}]", whole[name], tensor, tolerance) for name, tensor in expected.items()]
    return max(errors)


def assemble(ranks: list[Run], layout: Layout, what: str, total: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Global tensors by the user's name, from the pieces on all ranks.

    Args:
        total: for gradients, which add up over the stages that share a weight, over tp where they are partial and over the
            ranks that hold copies, and are averaged over dp. Weights must be the same on all of these instead.
    """
    pieces: dict[str, dict[tuple[int, int, int], torch.Tensor]] = {}
    specs: dict[str, ParameterSpec] = {}
    for rank, run in enumerate(ranks):
        at = layout.coordinate_of(rank)
        for name, tensor in getattr(run, what).items():
            spec = run.specs[name]
            specs[spec.name] = spec
            pieces.setdefault(spec.name, {})[at.pp, at.dp, at.tp] = tensor
    for name, held in pieces.items():
        spec, replicas = specs[name], []
        for d in range(layout.dp or 1):
            copies = [_over_tp([held[p, d, t] for t in range(layout.tp)], spec, total, name) for p in spec.stages]
            replicas.append(torch.stack(copies).sum(0) if total else _same(copies, f"{name} over stages"))
        yield name, torch.stack(replicas).mean(0) if total else _same(replicas, f"{name} over dp")


def _over_tp(shards: list[torch.Tensor], spec: ParameterSpec, total: bool, name: str) -> torch.Tensor:
    if spec.split is not None:
        whole = spec.split.unshard(shards, is_total=not total)
        if not total:
            _same([torch.cat(shards), torch.cat(list(spec.split.shards(whole, len(shards))))], f"parts of {name} over tp")
        return whole
    return torch.stack(shards).sum(0) if total and spec.partial else _same(shards, f"{name} over tp")


def _same(copies: list[torch.Tensor], what: str) -> torch.Tensor:
    """Copies of one tensor must be equal bit for bit, or they drift apart."""
    assert all(torch.equal(copy, copies[0]) for copy in copies), f"copies of {what} differ"
    return copies[0]


def _close(what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> float:
    assert ours.shape == theirs.shape, f"{what}: shape {list(ours.shape)} instead of {list(theirs.shape)}"
    error = relative_error(ours, theirs)
    assert error <= tolerance, f"{what}: relative error {error:.1e}, more than {tolerance:.1e}"
    return error


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is right."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30))
