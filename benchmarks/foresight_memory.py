"""What the planner says that ranks store, beside what they store: three models in twelve layouts.

The planner adds up blocks that it has taken apart one by one; what is measured is counted as in `benchmarks.storage`, and, where
there is a GPU, by its allocator, of one process.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.storage import BATCH, KINDS, LENGTH, VOCABULARY, Case, make_optimizer, measure_rank
from benchmarks.storage import Row as Stored
from lightning_par.demo.gpt import GPT
from lightning_par.demo.language_model import LanguageModel
from lightning_par.engine import Engine
from lightning_par.host.batch import split_batch
from lightning_par.host.loss import loss_of
from lightning_par.layout import parse_layout
from lightning_par.memory import read_optimizer
from lightning_par.pipeline.tables import choose_schedule
from lightning_par.plan.memory import RankMemory
from lightning_par.planner import Anatomy, Cluster, Device, Link
from lightning_par.planner.anatomy import ROWS
from lightning_par.planner.candidate import Candidate
from lightning_par.planner.estimate import Estimator
from lightning_par.prepare import prepare_plan
from lightning_par.runtime.mesh import Mesh

MOST_MEDIAN, MOST_WORST = 0.03, 0.08  # of activations; all else must be exact


@dataclass(frozen=True)
class Size:
    """Of a model and of its batch."""

    width: int = 64
    depth: int = 4
    heads: int = 4
    length: int = LENGTH
    vocabulary: int = VOCABULARY


GPU = "cuda"
ON_GPU = Size(1024, 8, 16, 512, 8192)  # what an allocator rounds is little beside it
CASES = (
    Case("dp1_mb2"),
    Case("tp2_mb2"),
    Case("tp2_sp_mb2", recompute="selective"),
    Case("dp2_zero1_mb2"),
    Case("dp2_zero2_mb2"),
    Case("dp2_zero3_mb2"),
    Case("pp2_mb4"),
    Case("pp2_mb4", "zb-h1"),
    Case("pp2_vp2_mb4"),
    Case("pp4_mb4", recompute="full"),
    Case("tp2_pp2_mb4"),
    Case("pp2_dp2_zero1_mb2"),
)
GPU_CASES = (Case("single"), Case("dp1_mb2"), Case("dp1_mb4"), Case("dp1_mb2", recompute="full"))


class Trainee(pl.LightningModule):
    """A language model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The mean loss of the next token."""
        logits: torch.Tensor = self.model(input_ids=batch["tokens"]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


def make_demo(size: Size = Size()) -> pl.LightningModule:
    torch.manual_seed(0)
    return LanguageModel(GPT(size.vocabulary, size.width, size.depth, size.heads))


def make_gpt2(size: Size = Size()) -> pl.LightningModule:
    """Learned positions, fused query, key and value, biases, tied ends."""
    torch.manual_seed(0)
    sizes = {"n_embd": size.width, "n_layer": size.depth, "n_head": size.heads, "n_positions": size.length}
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return Trainee(GPT2LMHeadModel(GPT2Config(**sizes, **still, vocab_size=size.vocabulary)))


def make_llama(size: Size = Size()) -> pl.LightningModule:
    """Gated, with two query heads for each key head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=11 * size.width // 4,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.length,
    )
    return Trainee(LlamaForCausalLM(config))


Make = Callable[..., pl.LightningModule]
MODELS: Mapping[str, Make] = {"demo": make_demo, "GPT-2": make_gpt2, "Llama": make_llama}


@dataclass(frozen=True)
class Row:
    """One rank.

    Attributes:
        model: its name.
        stored: measured and foreseen, by kind.
    """

    model: str
    stored: Stored

    @property
    def error(self) -> float:
        """Of the activations that were foreseen, as a fraction of what was measured."""
        return self.stored.expected["activations"] / self.stored.measured["activations"] - 1


def foresee(make: Make, cases: Sequence[Case], size: Size = Size()) -> list[tuple[RankMemory, ...]]:
    """What the planner says, of each layout by pp coordinate."""
    module = make(size)
    form = read_optimizer(make_optimizer(module), dict(module.named_parameters()))
    assert form is not None
    few, more = (_batch(rows, size) for rows in ROWS)
    device = Device(2**40, 0.0, 1e12, {"float32": 1e12}, {"float32": 1e12}, 1e-6)
    cluster = Cluster("any", 1, 4, device, Link(1e9, 1e-6), Link(1e9, 1e-6), "memory does not ask")
    estimator = Estimator(Anatomy(module, (few, more), loss_of, form), cluster)
    return [estimator.memory(_candidate(case)) for case in cases]


def _candidate(case: Case) -> Candidate:
    schedule, layout = choose_schedule(case.schedule, parse_layout(case.word))
    layout = replace(layout, dp=layout.dp or 1, microbatches=layout.microbatches or 1)
    recompute: Any = case.recompute
    return Candidate(layout, BATCH // (layout.microbatches or 1), schedule, recompute)


def _batch(rows: int, size: Size) -> dict[str, torch.Tensor]:
    return {name: torch.randint(size.vocabulary, (rows, size.length)) for name in ("tokens", "targets")}


def measure_ranks(
    rank: int, world_size: int, model: str, cases: Sequence[Case], foreseen: Sequence[tuple[RankMemory, ...]]
) -> list[Row]:
    """Count in every layout of so many ranks. Collective over the world."""
    pairs = zip(cases, foreseen, strict=True)
    return [Row(model, measure_rank(rank, world_size, case, MODELS[model], expected)) for case, expected in pairs]


# ---------------------------------------------------------------------- on a GPU


@dataclass(frozen=True)
class Peak:
    """One process on a GPU.

    Attributes:
        model, case: names.
        measured: the most bytes that the allocator has given at once in the forwards and backwards of a step.
        expected: all that is foreseen.
    """

    model: str
    case: str
    measured: int
    expected: int

    @property
    def error(self) -> float:
        """Of what was foreseen, as a fraction of what was measured."""
        return self.expected / self.measured - 1


def measure_on_gpu(rank: int, world_size: int) -> list[Peak]:
    """Nothing where there is none; asked in a process of its own, because one that has asked cannot fork."""
    if not torch.cuda.is_available():
        return []
    warnings.simplefilter("ignore")
    found = []
    for model, make in MODELS.items():
        for case, expected in zip(GPU_CASES, foresee(make, GPU_CASES, ON_GPU), strict=True):
            found.append(Peak(model, case.name, _peak(make(ON_GPU), case), expected[0].total))
    return found


def _peak(module: pl.LightningModule, case: Case) -> int:
    """Of the third step, without what the libraries of the GPU keep for themselves."""
    device = torch.device(GPU)
    torch.ones(64, 64, device=device).matmul(torch.ones(64, 64, device=device))  # they get theirs now
    gc.collect()
    before = torch.cuda.memory_allocated()
    layout, batch = parse_layout(case.word).resolve(1), _batch(BATCH, ON_GPU)
    plan = prepare_plan(module, batch, layout, {"recompute": {"*": case.recompute}})
    engine = Engine(module, plan, Mesh(layout, timedelta(seconds=60)), device)
    states = engine.own_states([make_optimizer(module)])
    pieces = split_batch({name: tensor.to(device) for name, tensor in batch.items()}, layout.microbatches or 1)
    weights, shapes = [rows / BATCH for _, rows in pieces], [(rows,) for _, rows in pieces]
    step: Any = module.training_step
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        engine.train(lambda index: step(pieces[index][0], 0), weights, loss_of, shapes)
        peak = torch.cuda.max_memory_allocated()
        states.reduce()
        states.step()
        states.zero_grad()
    return peak - before


# ---------------------------------------------------------------------- what it comes to


def activation_errors(rows: Iterable[Row]) -> tuple[float, float]:
    """Median and worst, without signs."""
    errors = [abs(row.error) for row in rows]
    return median(errors), max(errors)


def inexact(rows: Iterable[Row]) -> list[str]:
    """One line for each model state that is not what was foreseen, to the byte."""
    return [
        f"{row.model}, {row.stored.case}, rank {row.stored.rank}: {kind} are {row.stored.measured[kind]:,} bytes; the planner says "
        f"{row.stored.expected[kind]:,}"
        for row in rows
        for kind in KINDS[:-1]
        if row.stored.measured[kind] != row.stored.expected[kind]
    ]
