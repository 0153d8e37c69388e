"""Vocabularies that tp does not divide, and what steps compute from logits, train as in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity

from lightning_par.demo.gpt import GPT
from lightning_par.errors import ModelError
from lightning_par.host.strategy import HybridParallelStrategy
from lightning_par.layout import Layout, parse_layout
from lightning_par.plan.render import render_plan
from lightning_par.runtime.parameter import get_spec
from tests.models import adamw, make_batch
from tests.parity import MakeModel, Run, Steps, compare, fit
from tests.planning import plan_of
from tests.ranks import run_ranks

V = 131  # over 2, 3 and 4 ranks: 1 row is added
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What most steps do; labels of a tokenizer's padding are -100."""
    return F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), ignore_index=-100)


class Language(pl.LightningModule):
    """A GPT of 6 heads (for tp2 and tp3) or 4 (for tp4), whose step sees every token of the odd vocabulary."""

    def __init__(self, heads: int, loss: Loss = token_loss, is_tied: bool = False, has_bias: bool = False) -> None:
        super().__init__()
        self.loss = loss
        self.network = GPT(vocab_size=V, width=8 * heads, depth=2, heads=heads)
        if has_bias:
            self.network.head = nn.Linear(8 * heads, V)
        if is_tied:
            self.network.head.weight = self.network.embedding.weight

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = batch["tokens"] * 37 % V
        labels = tokens[:, 1:].masked_fill(batch["tokens"][:, 1:] == 0, -100)
        return self.network(tokens)[:, :-1], labels

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.loss(*self(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


class Measured(Language):
    """A step that logs what people log of a language model, by hand and with torchmetrics."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=V, top_k=2, average="micro", ignore_index=-100)
        self.perplexity = Perplexity(ignore_index=-100)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits, labels = self(batch)
        loss = token_loss(logits, labels)
        is_counted = labels != -100
        best = logits.topk(5, dim=-1).indices
        values, places = logits.softmax(-1).max(-1)
        self.log("accuracy", (logits.argmax(-1) == labels)[is_counted].float().mean())
        self.log("top 5", (best == labels[..., None]).any(-1)[is_counted].float().mean())
        self.log("confidence", values.mean())
        self.log("agreement", (places == best[..., 0]).float().mean())
        self.log("perplexity by hand", F.nll_loss(F.log_softmax(logits, -1).flatten(0, 1), labels.flatten()).exp())
        self.log("bits", loss / 0.6931)
        self.accuracy(logits.flatten(0, 1), labels.flatten())
        self.perplexity(logits, labels)
        self.log("accuracy of torchmetrics", self.accuracy, on_step=True, on_epoch=False)
        self.log("perplexity of torchmetrics", self.perplexity, on_step=True, on_epoch=False)
        return loss


def fused(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Soft caps, a temperature, smoothing, and the loss on the logarithm of the sum of exponentials."""
    capped = 30.0 * torch.tanh(logits.float() / 30.0) / 0.7
    main = F.cross_entropy(capped.transpose(1, 2), labels, label_smoothing=0.1, weight=torch.linspace(0.5, 1.5, V))
    return main + 1e-3 * capped.logsumexp(-1).square().mean()


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The label's logarithm of a probability, picked; ignored labels masked; smoothing by a mean."""
    scores = F.log_softmax(logits, dim=-1)
    picked = scores.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    is_counted = (labels != -100).float()
    return -((0.9 * picked + 0.1 * scores.mean(-1)) * is_counted).sum() / is_counted.sum()


def distilled(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A teacher's whole logits, as a distribution and as a target of a divergence."""
    teacher = F.one_hot(labels.clamp(min=0), V) * 4.0
    flat = logits.flatten(0, 1)
    hard = F.cross_entropy(flat, teacher.softmax(-1).flatten(0, 1))
    return hard + F.kl_div(flat.log_softmax(-1), teacher.flatten(0, 1).log_softmax(-1), log_target=True, reduction="batchmean")


def language(heads: int, **options: Any) -> MakeModel:
    return lambda: Language(heads, **options)


def kinds_of_heads(heads: int) -> dict[str, MakeModel]:
    return {
        "untied": language(heads),
        "tied": language(heads, is_tied=True),
        "untied with a bias": language(heads, has_bias=True),
        "tied with a bias": language(heads, is_tied=True, has_bias=True),
    }


LOSSES = {loss.__name__: loss for loss in (fused, by_hand, distilled)}


class Seen:
    """What one rank saw of a run: the run, what was logged, what was gathered, and the padding of its parameters."""

    def __init__(self, make: MakeModel, layout: Layout, rank: int) -> None:
        strategy = HybridParallelStrategy(layout, print_plan=False)
        loader: DataLoader[Any] = DataLoader(Steps(1), batch_size=None)
        host, module, self.run = fit(make, loader, strategy=strategy, devices=layout.world_size)
        self.run.weights = {name: value.detach().clone() for name, value in strategy.states.full_parameters()}
        self.run.specs = {name: get_spec(p) for name, p in module.named_parameters()}
        self.logged = {name: float(value) for name, value in host.callback_metrics.items()}
        self.gathers = dict(strategy.mesh.tp.gathers)
        self.padding = _padding(self.run, layout.tp, layout.coordinate_of(rank).tp)
        strategy.states.close()


def _padding(run: Run, tp: int, coordinate: int) -> torch.Tensor:
    """All that this rank's parameters hold beyond the global ones, in one tensor."""
    beyond = []
    for name, spec in run.specs.items():
        if spec.split is not None:
            is_real = spec.split.shard(torch.ones(spec.shape), tp, coordinate)
            beyond.append(run.weights[name][is_real == 0])
    return torch.cat(beyond)


def _see(rank: int, size: int, makers: dict[str, MakeModel], layout: Layout) -> dict[str, Seen]:
    return {name: Seen(make, layout, rank) for name, make in makers.items()}


def run_both(makers: dict[str, MakeModel], word: str) -> dict[str, tuple[dict[str, float], list[Seen]]]:
    """Train alone and in a layout and hold the runs against each other.

    Returns:
        By model, what was logged in one process, and what every rank saw.
    """
    layout = parse_layout(word)
    layout = layout.resolve(layout.world_size)
    results = run_ranks(_see, layout.world_size, makers, layout)
    both = {}
    for name, make in makers.items():
        host, module, alone = fit(make, DataLoader(Steps(1), batch_size=None), devices=1)
        alone.weights = {key: p.detach().clone() for key, p in module.named_parameters()}
        ranks = [result[name] for result in results]
        compare(alone, [seen.run for seen in ranks], layout)
        both[name] = {key: float(value) for key, value in host.callback_metrics.items()}, ranks
    return both


@pytest.mark.parametrize(("word", "heads"), [("tp2", 6), ("tp3", 6), ("tp4", 4), ("tp2_pp2_mb1", 4)])
def test_an_odd_vocabulary_trains_as_in_one_process(word: str, heads: int) -> None:
    for name, (_, ranks) in run_both(kinds_of_heads(heads), word).items():
        padding = torch.cat([seen.padding for seen in ranks])
        # rows of 8 x heads for each of two weights or one tied over stages, and of the bias
        weights = 1 if name.startswith("tied") and "pp" not in word else 2
        assert padding.numel() == weights * 8 * heads + ("bias" in name)
        assert (padding == 0).all(), name  # AdamW decays weights, and would move them by any gradient
        assert all(seen.gathers == {} for seen in ranks), name


def test_losses_never_gather_logits() -> None:
    for name, (_, ranks) in run_both({name: language(6, loss=loss) for name, loss in LOSSES.items()}, "tp2").items():
        assert all(seen.gathers == {} for seen in ranks), name


@pytest.mark.parametrize("word", ["tp3", "tp2_pp2_mb1"])
def test_what_is_logged_of_logits_is_that_of_the_whole(word: str) -> None:
    ((alone, ranks),) = run_both({"measured": lambda: Measured(6)}, word).values()
    assert len(alone) == 8
    for seen in ranks:
        assert seen.logged == pytest.approx(alone, rel=1e-5)


def test_the_plan_says_what_is_padded() -> None:
    plan = plan_of(Language(4, is_tied=True, has_bias=True), "tp4", make_batch(0, 4))
    note = (
        "131 rows of network.embedding and network.head do not divide by tp=4: padded by 1 of zeros, which nothing reads or "
        "trains, to 33 on every rank"
    )
    assert note in plan.notes
    text = render_plan(plan)
    assert "vocabulary: 131/4 x 32, padded by 1" in text
    parameters = {parameter.spec.name: parameter for parameter in plan.parameters}
    weight = parameters["network.embedding.weight"]
    assert weight.spec.shape == (V, 32) and weight.local_numel(1) == V * 32 and weight.local_numel(4) == 33 * 32
    assert plan.stages[0].num_parameters == sum(p.numel() for p in Language(4, is_tied=True, has_bias=True).parameters())


def test_an_odd_head_needs_its_global_shape() -> None:
    with pytest.raises(ModelError, match=r"network.head has 131 outputs, which 2 .* cannot share equally; tp 1, 131 would work"):
        plan_of(Language(4), "tp2", make_batch(0, 4), {"activation": {"network.head": "local"}})


class Masked(Language):
    """Tokens are masked in the step, and segment ids come with the batch: the larger embedding is still the vocabulary."""

    def __init__(self) -> None:
        super().__init__(4)
        self.kinds = nn.Embedding(2, V)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        logits, labels = super().forward(batch)
        return logits + self.kinds(batch["label"] % 2)[:, None], labels


def test_tokens_computed_in_the_step_are_the_vocabulary() -> None:
    plan = plan_of(Masked(), "tp2", make_batch(0, 4))
    chosen = {layer.name: layer.kind for layer in plan.layers if "blocks" not in layer.name}
    assert chosen == {"network.embedding": "vocabulary", "network.head": "column", "kinds": "replicate"}
