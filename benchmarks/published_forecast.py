"""What the planner says of published runs, from their models and layouts alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.command import report
from benchmarks.published_runs import Run
from lightning_par import Layout, deferred_init
from lightning_par.memory.optimizer import GroupForm, OptimizerForm
from lightning_par.pipeline.schedules import default_schedule
from lightning_par.planner import Anatomy, Cluster, read_cluster
from lightning_par.planner.anatomy import ROWS
from lightning_par.planner.candidate import Candidate
from lightning_par.planner.estimate import Estimator
from lightning_par.runtime.precision import Precision

_CLUSTERS = Path(__file__).parents[1] / "conf" / "cluster"
_HALF = Precision("bf16-true", parameters=torch.bfloat16)
_ADAM_BYTES, _STEP_BYTES = 8, 4


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        run: as published.
        layout: that was forecast.
        seconds: of a step, as forecast.
        parts: of them, by what takes them.
    """

    run: Run
    layout: Layout
    seconds: float
    parts: dict[str, float]

    @property
    def error(self) -> float:
        """Of the forecast, as a fraction of what was published."""
        return self.seconds / self.run.seconds - 1


class Trainee(pl.LightningModule):
    """A language model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss


def forecast_runs(runs: list[Run]) -> list[Row]:
    """Forecast runs; progress goes to stderr."""
    known: dict[str, Anatomy] = {}
    rows = []
    for index, run in enumerate(runs):
        report(f"{index + 1} of {len(runs)}: {run.name}")
        if str(run.sizes) not in known:
            known[str(run.sizes)] = take_apart(run.family, run.sizes, run.length)
        estimator = Estimator(known[str(run.sizes)], _cluster(run))
        found = [estimator.estimate(candidate) for candidate in _candidates(run)]
        fitting = [each for each in found if each.most_bytes <= estimator.cluster.device.usable_bytes]
        best = min(fitting or found, key=lambda each: each.step_seconds)
        rows.append(Row(run, best.candidate.layout, best.step_seconds, dict(best.parts)))
    return rows


def _candidates(run: Run) -> Iterator[Candidate]:
    """The run; of one that is not published whole every way to do what is."""
    if run.batch is None:
        yield Candidate(run.layout, run.rows, default_schedule(run.layout.vp), run.recompute)
        return
    pp, layers = run.layout.pp, run.sizes["n_layer"]
    for rows, vp in product((1, 2, 4, 8), range(1, layers // pp + 1) if pp > 1 else (1,)):
        count = run.batch // rows
        if run.batch % rows == 0 and layers % (pp * vp) == 0 and (vp == 1 or count % pp == 0):
            yield Candidate(replace(run.layout, vp=vp, microbatches=count), rows, default_schedule(vp), run.recompute)


def take_apart(family: str, sizes: dict[str, Any], length: int) -> Anatomy:
    """A model without memory, for training in half precision with Adam.

    Args:
        family: ``gpt2`` or ``llama``, of transformers.
        sizes: of its config.
        length: tokens of a sample.
    """
    with deferred_init():
        module = Trainee(_model(family, sizes))
    form = OptimizerForm((GroupForm(frozenset(name for name, _ in module.named_parameters()), _ADAM_BYTES, _STEP_BYTES),))
    few, more = (torch.zeros(rows, length, dtype=torch.long) for rows in ROWS)
    return Anatomy(module, (few, more), lambda loss: loss, form, _HALF)


def _model(family: str, sizes: dict[str, Any]) -> nn.Module:
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes))
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)  # dropped attention has no quick kernel
    return GPT2LMHeadModel(GPT2Config(**sizes, **still))


def h100_nodes(count: int) -> Cluster:
    """So many nodes of 8 H100."""
    return read_cluster(yaml.safe_load((_CLUSTERS / "h100_8x.yaml").read_text()), "h100_8x", count)


def _cluster(run: Run) -> Cluster:
    config: dict[str, Any] = yaml.safe_load((_CLUSTERS / f"{run.cluster}.yaml").read_text())
    config["device"].update(run.changes)
    return read_cluster(config, run.cluster, max(1, run.layout.world_size // config["devices_per_node"]))
