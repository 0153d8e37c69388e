"""Losses of parts with different numbers of targets: by ``loss_weight`` the run is that of one process, without it is not."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM  # noqa: F401

from lightning_par.errors import ConfigurationError, DataError
from lightning_par.host.batch import split_batch
from lightning_par.host.loss_weight import count_targets, read_loss_weight
from lightning_par.host.strategy import HybridParallelStrategy
from lightning_par.layout import Layout, parse_layout
from lightning_par.runtime.parameter import get_spec
from tests.models import LENGTH, ByteModel, TransformersModel, llama, make_batch
from tests.parity import REPLICA_BATCH, Run, Steps, compare, fit
from tests.planning import Block, Chain, quiet_trainer
from tests.ranks import run_ranks

IGNORED = -100


def ragged(step: int, size: int) -> dict[str, Any]:
    """A batch whose samples have 0 to 15 targets. At step 1 the first microbatches have none, at step 2 the first replica."""
    batch: dict[str, Any] = make_batch(step, size)
    starts = torch.randint(0, LENGTH - 1, (size,), generator=torch.Generator().manual_seed(step))
    starts[: (0, 5, REPLICA_BATCH if size > REPLICA_BATCH else 0)[step]] = LENGTH
    labels = batch["tokens"].masked_fill(torch.arange(LENGTH) < starts[:, None], IGNORED)
    return {**batch, "targets": {"labels": labels}}


class Ragged(ByteModel):
    """Takes the mean by hand: over no target it is undefined, and so is its gradient."""

    def _loss(self, batch: dict[str, Any]) -> torch.Tensor:
        labels = batch["targets"]["labels"][:, 1:]
        logits = self.network(batch["tokens"][:, :-1])
        is_target = labels != IGNORED
        losses = F.cross_entropy(logits.flatten(0, 1), labels.clamp_min(0).flatten(), reduction="none")
        return (losses * is_target.flatten()).sum() / is_target.sum()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:  # type: ignore[override]
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("by_samples", batch["tokens"].float().mean(), on_step=False, on_epoch=True, batch_size=len(batch["tokens"]))
        return {"loss": loss, "twice": 2 * loss.detach()}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def val_dataloader(self) -> Any:
        strategy: Any = self.trainer.strategy
        dp_rank = strategy.dp_rank if isinstance(strategy, HybridParallelStrategy) else None
        return DataLoader(Steps(DP_SIZE[0], dp_rank, ragged), batch_size=None)


class RaggedLlama(TransformersModel):
    """Shifts its labels inside."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch["tokens"], labels=batch["targets"]["labels"]).loss
        return loss


def count(batch: dict[str, Any]) -> int:
    return int((batch["targets"]["labels"][:, 1:] != IGNORED).sum())


DP_SIZE = [1]  # of the layout that runs, for the module's own loader
LABELS = {"field": "targets.labels", "shift": 1}
CASES: dict[str, tuple[Callable[[], pl.LightningModule], Any, dict[str, Any]]] = {
    "by hand": (Ragged, LABELS, {}),
    "accumulated": (Ragged, count, {"accumulate_grad_batches": 3, "max_steps": 1}),
    "Llama": (lambda: RaggedLlama(llama().model), LABELS, {}),
}


def run(make: Callable[[], pl.LightningModule], dp_size: int, dp_rank: int | None = None, **options: Any) -> tuple[Any, Any, Run]:
    DP_SIZE[0] = dp_size
    data: Any = Steps(dp_size, dp_rank, ragged)
    return fit(make, DataLoader(data, batch_size=None), num_sanity_val_steps=0, **options)


def logged(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def train_rank(rank: int, layout: Layout, name: str, is_weighted: bool = True) -> tuple[Run, dict[str, float]]:
    """One case in a layout, as this rank sees it, and what it knows of logged values."""
    make, weight, options = CASES[name]
    how: dict[str, Any] = {"loss_weight": weight} if is_weighted else {"detect_anomaly": None}  # without, the loss is undefined
    strategy: Any = HybridParallelStrategy(layout, print_plan=False, **how)
    options = {"strategy": strategy, "devices": layout.world_size, **options}
    trainer, module, view = run(make, layout.dp or 1, layout.coordinate_of(rank).dp, **options)
    view.weights = {key: value.detach().clone() for key, value in strategy.states.full_parameters()}
    view.specs = {key: get_spec(p) for key, p in module.named_parameters()}
    strategy.states.close()
    return view, logged(trainer)


def train_ranks(rank: int, world_size: int, words: tuple[str, ...], without: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
    """Every case in every layout; at last one without ``loss_weight`` in those where it must go wrong."""
    resolved = {word: parse_layout(word).resolve(world_size) for word in words}
    seen: dict[tuple[str, ...], Any] = {
        (word, name): train_rank(rank, layout, name) for word, layout in resolved.items() for name in CASES
    }
    return seen | {(word, "without"): train_rank(rank, resolved[word], "Llama", is_weighted=False) for word in without}


def train_alone(name: str, dp_size: int) -> tuple[Run, dict[str, float]]:
    make, _, options = CASES[name]
    trainer, module, view = run(make, dp_size, devices=1, **options)
    view.weights = {key: p.detach().clone() for key, p in module.named_parameters()}
    return view, logged(trainer)


def check(world_size: int, words: tuple[str, ...], without: tuple[str, ...]) -> None:
    ranks = run_ranks(train_ranks, world_size, words, without)
    for word in words:
        layout = parse_layout(word).resolve(world_size)
        for name in CASES:
            alone, told = train_alone(name, layout.dp or 1)
            try:
                compare(alone, [rank[word, name][0] for rank in ranks], layout)
            except AssertionError as error:
                raise AssertionError(f"{name} in {word}: {error}") from None
            for rank in ranks:
                assert rank[word, name][1] == pytest.approx(told, rel=1e-5), (name, word)
        if word in without:
            with pytest.raises(AssertionError, match="losses on rank 0: relative error"):
                compare(alone, [rank[word, "without"][0] for rank in ranks], layout)


def test_parity_on_ragged_targets_on_two_ranks() -> None:
    check(2, ("pp2", "dp2", "tp2", "dp2_zero3"), without=("pp2", "dp2"))


def test_parity_on_ragged_targets_on_four_ranks() -> None:
    check(4, ("pp2_dp2", "pp2_dp2_zero1", "pp2_dp2_zero2"), without=())


def test_what_is_compared_is_ragged_and_logged() -> None:
    view, told = train_alone("by hand", 2)
    assert told.keys() == {"train_loss", "train_loss_step", "train_loss_epoch", "by_samples", "val_loss"}
    assert len(view.losses) == 3
    numbers = [count(microbatch) for microbatch, _ in split_batch(ragged(1, 8), 4)]
    assert numbers[:2] == [0, 0] and len(set(numbers[2:])) == 2


# ---------------------------------------------------------------------- a whole batch without targets


def no_target(step: int, size: int) -> dict[str, Any]:
    """The batches of `ragged`; the second has no target at all."""
    batch = ragged(step, size)
    return {**batch, "targets": {"labels": torch.full_like(batch["tokens"], IGNORED) if step == 1 else batch["targets"]["labels"]}}


class Plain(Ragged):
    """Steps by the gradient alone."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def val_dataloader(self) -> Any:
        return []


def skip_a_batch(rank: int, world_size: int, word: str) -> dict[str, Any]:
    layout = parse_layout(word).resolve(world_size)
    steps: list[torch.Tensor] = []

    class Weights(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            steps.append(torch.cat([p.detach().flatten() for p in module.parameters()]))

    strategy = HybridParallelStrategy(layout, print_plan=False, loss_weight=LABELS)
    data: Any = Steps(layout.dp or 1, layout.coordinate_of(rank).dp, no_target)
    options: dict[str, Any] = {"strategy": strategy, "max_epochs": 2, "callbacks": [Weights()], "use_distributed_sampler": False}
    trainer = quiet_trainer(word, world_size, **options)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Plain(), DataLoader(data, batch_size=None))
    return {
        "kept": [bool(torch.equal(one, other)) for one, other in pairwise(steps)],
        "finite": bool(torch.isfinite(steps[-1]).all()),
        "loss": float(trainer.callback_metrics["train_loss"]),
        "warned": sum("counts no target in a whole batch: its loss is taken as 0" in str(each.message) for each in caught),
    }


def test_a_batch_without_any_target_changes_nothing_and_is_told_once() -> None:
    ranks = run_ranks(skip_a_batch, 4, "pp2_dp2")
    assert [each["warned"] for each in ranks] == [0, 0, 1, 1]  # on the last stage
    for each in ranks:
        assert each["kept"] == [True, False, False, True, False] and each["finite"]
        assert 4.0 < each["loss"] < 6.0  # the mean of the other batches, not of 0 too


# ---------------------------------------------------------------------- counting, and what cannot be counted

Pair = namedtuple("Pair", "inputs labels")
TARGETS = torch.tensor([[1, 2, IGNORED], [3, IGNORED, 0]])


@pytest.mark.parametrize(
    ("given", "batch", "counted"),
    [
        ("labels", {"labels": TARGETS}, 4),
        ("inner.labels", {"inner": {"labels": TARGETS}}, 4),
        (1, (torch.zeros(2), TARGETS), 4),
        ("labels", Pair(torch.zeros(2), TARGETS), 4),
        ({"field": "labels", "ignore_index": 0}, {"labels": TARGETS}, 5),
        ({"field": "labels", "shift": 1}, {"labels": TARGETS}, 2),
        (lambda batch: 7, {}, 7),
        (lambda batch: torch.tensor(2.5), {}, 2.5),
        (partial(lambda batch, scale: scale * len(batch), scale=2), {"x": TARGETS}, 2),
    ],
)
def test_targets_are_counted(given: Any, batch: Any, counted: float) -> None:
    target_count = read_loss_weight(given)
    assert target_count is not None
    assert count_targets(target_count, [batch, batch]) == [counted, counted]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (1.5, r"loss_weight=1.5: name the field of the batch with the loss's targets, such as loss_weight=labels"),
        ("", r"loss_weight='': name the field"),
        ({"fields": "labels"}, r"there is no key 'fields': the keys are field, ignore_index and shift"),
        ({"ignore_index": 0}, r"loss_weight=\{'ignore_index': 0\}: the key 'field' is missing"),
        ({"field": "labels", "shift": -1}, r"shift must be an integer, 0 or more"),
        ({"field": "labels", "ignore_index": "pad"}, r"ignore_index must be an integer$"),
    ],
)
def test_what_is_no_loss_weight(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        HybridParallelStrategy("pp2", loss_weight=given)


def named(batch: Any) -> Any:
    return batch["tokens"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "labels",
            r"loss_weight=labels: the batch has no 'labels': it has tokens, inner.mask: name one of them, or give a function",
        ),
        ("words", r"loss_weight=words: 'words' of the batch is a list: name the tensor with the loss's targets"),
        ({"field": "inner.mask", "shift": 1}, r"loss_weight=inner.mask, shift=1: .* has shape \(4,\), .*: leave shift out"),
        (named, r"loss_weight=named: the function returned a tensor of shape \(4, 6\): return the number of target elements"),
        (lambda batch: "many", r"loss_weight=<lambda>: the function returned 'many': return"),
        (lambda batch: -1, r"the function returned -1.0: return .* at least 0"),
        (
            lambda batch: 1.5,
            r"it counts 1.5 targets in the first batch and 1.5 \+ 1.5 \+ 1.5 \+ 1.5 in its 4 microbatches, which must",
        ),
    ],
)
def test_what_cannot_be_counted_is_found_before_any_process(given: Any, message: str) -> None:
    batch = {"tokens": torch.ones(4, 6, dtype=torch.long), "inner": {"mask": torch.ones(4)}, "words": ["a"] * 4}
    with pytest.raises(DataError, match=message):
        fit_weighted(given, Chain(Block, depth=4), batch)


def test_a_batch_that_is_one_tensor_has_no_fields() -> None:
    with pytest.raises(DataError, match=r"has no 'labels': it is a Tensor without fields: .*give a function of the batch"):
        count_targets(read_loss_weight("labels"), [torch.zeros(3)])  # type: ignore[arg-type]


class Manual(Chain):
    def __init__(self) -> None:
        super().__init__(Block)
        self.automatic_optimization = False


def test_manual_optimization_weighs_nothing() -> None:
    with pytest.raises(
        ConfigurationError, match=r"loss_weight=tokens: Manual has automatic_optimization=False .*leave loss_weight"
    ):
        fit_weighted("tokens", Manual(), {"tokens": torch.ones(4, 6, dtype=torch.long)}, "tp2")


def fit_weighted(given: Any, module: pl.LightningModule, batch: Any, word: str = "pp2") -> None:
    strategy: Any = HybridParallelStrategy(word, loss_weight=given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(word, 2, strategy=strategy, max_steps=1)
        trainer.fit(module, DataLoader([batch], batch_size=None))
