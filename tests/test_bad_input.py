"""What cannot work, as a user types it: refused before any process or process group exists, with what to do instead."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_par.errors import ConfigurationError, DataError, LayoutError, ModelError, PlanError
from lightning_par.host.strategy import HybridParallelStrategy
from lightning_par.layout import parse_layout
from tests.models import llama, make_batch
from tests.planning import Chain, Unordered, quiet_trainer, tokens


@pytest.fixture(autouse=True)
def _nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    yield
    assert not torch.distributed.is_initialized()


class Block(nn.Module):
    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def loader(batch: Any = None) -> DataLoader[Any]:
    return DataLoader([batch or tokens()], batch_size=None)


def fit(
    word: str,
    module: pl.LightningModule | None = None,
    data: Any = None,
    plan: Mapping[str, Any] | None = None,
    devices: int = 4,
    **options: Any,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(word, devices, plan, max_steps=1, **options)
        trainer.fit(module or Chain(Block, depth=4), loader() if data is None else data)


# ---------------------------------------------------------------------- the layout word


def test_unknown_token() -> None:
    with pytest.raises(LayoutError, match=r"parallel=tp2_xx2: unknown token 'xx2'; .*Did you mean tp2_pp2"):
        HybridParallelStrategy("tp2_xx2")


def test_repeated_token() -> None:
    with pytest.raises(LayoutError, match=r"parallel=tp2_tp4: 'tp' is given twice \(tp2 and tp4\): keep one of them"):
        parse_layout("tp2_tp4")


@pytest.mark.parametrize(
    ("word", "match"), [("tp0", "tp0: .* at least 1"), ("zero4", "zero4: the ZeRO stage must be 0, 1, 2 or 3")]
)
def test_out_of_range(word: str, match: str) -> None:
    with pytest.raises(LayoutError, match=match):
        parse_layout(word)


def test_degrees_that_do_not_divide_the_devices() -> None:
    match = (
        r"parallel=tp4_pp2 needs a multiple of 8 processes \(tp 4 x pp 2\), the trainer has 6 processes: use parallel=\w+ or "
        r"parallel=\w+ or devices=8"
    )
    with pytest.raises(LayoutError, match=match):
        fit("tp4_pp2", devices=6)
    with pytest.raises(
        LayoutError, match=r"parallel=tp2_dp4 needs 8 processes .*, the trainer has 4 processes: use parallel=tp2_dp2"
    ):
        fit("tp2_dp4")


# ---------------------------------------------------------------------- the model


def test_more_stages_than_blocks() -> None:
    match = (
        r"parallel=pp4 asks for 4 stages, and blocks has 2 blocks: every stage needs one, use parallel=pp2_dp2 or parallel=tp2_pp2"
    )
    with pytest.raises(ModelError, match=match):
        fit("pp4", Chain(Block, depth=2))


def test_heads_that_do_not_divide() -> None:
    match = (
        r"parallel=tp4: blocks.0.q has 2 heads, which 4 tensor-parallel ranks cannot share equally; tp 1, 2 would work: use "
        r"parallel=tp2_\w+ or parallel=\w+, or keep it whole with plan.split=\{blocks.0.q: replicate\}"
    )
    with pytest.raises(ModelError, match=match):
        fit("tp4", Chain(lambda: Block(heads=2)))


def test_key_heads_that_do_not_divide() -> None:
    """Two key heads for four query heads: four ranks could hold copies of them, three cannot share either."""
    with pytest.raises(ModelError, match=r"layers.0.self_attn.q_proj has 4 heads, which 3 .* tp 1, 2, 4 would work"):
        fit("tp3", llama(), loader(make_batch(0, 4)), devices=3)


class Plain(Chain):
    """No chain: one container is too short, the other does not run as a whole."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__(lambda: Block(heads), depth=1)
        self.mixed = nn.Sequential(nn.Linear(16, 16), nn.ReLU())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.mixed[0](super().forward(tokens)[..., :16])


def test_no_chain() -> None:
    match = (
        r"parallel=pp2_dp2 needs a chain of blocks, and Plain has none that the step runs in order \(looked at blocks: has 1 "
        r"module; mixed: the step runs 1 of its 2 blocks\): name the container of the blocks with plan.chain=PATH, or use parallel="
    )
    with pytest.raises(ModelError, match=match):
        fit("pp2", Plain())


def test_what_is_named_instead_has_been_tried_out() -> None:
    """By the rule of the pipeline alone tp2_dp2 is near, too; two ranks cannot share one head."""
    with pytest.raises(ModelError, match=r"with plan.chain=PATH, or use parallel=dp4$"):
        fit("pp2", Plain(heads=1))
    with pytest.raises(ModelError, match=r"tp 1 would work: use parallel=dp4 or parallel=pp2_dp2, or keep it whole"):
        fit("tp2_dp2", Chain(lambda: Block(heads=1), depth=4))


def test_blocks_that_do_not_run_in_order() -> None:
    with pytest.raises(ModelError, match=r"looked at blocks: its blocks do not run once each, in order \(blocks.1 ran first\)"):
        fit("pp2", Unordered(Block))
    with pytest.raises(ModelError, match=r"plan.chain=blocks is no chain of blocks: its blocks do not run once each"):
        fit("pp2", Unordered(Block), plan={"chain": "blocks"})


class NoLoss(Chain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)


def test_no_loss() -> None:
    with pytest.raises(ModelError, match=r"NoLoss.training_step returned None: .* return that tensor"):
        fit("tp2_pp2", NoLoss(Block))


class Manual(Chain):
    def __init__(self) -> None:
        super().__init__(Block)
        self.automatic_optimization = False


class Adversarial(Chain):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.blocks, self.head)], []


def test_optimization_that_a_pipeline_cannot_run() -> None:
    match = r"parallel=pp2_dp2: Manual has automatic_optimization=False, .*: use parallel=\w+ or parallel=\w+, or automatic"
    with pytest.raises(ConfigurationError, match=match):
        fit("pp2", Manual())
    match = r"parallel=pp2_dp2: Adversarial.configure_optimizers returns 2 optimizers, .* groups of one optimizer, or use parallel="
    with pytest.raises(ConfigurationError, match=match):
        fit("pp2", Adversarial(Block))


# ---------------------------------------------------------------------- the plan section


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        ({"chains": "blocks"}, r"plan.chains: unknown line; a plan section has chain, stages, costs, split, segments, activation"),
        ({"chain": "layers"}, r"plan.chain=layers: no ModuleList or Sequential of that name; the module has: blocks"),
        (
            {"stages": [1, 2]},
            r"plan.stages=\[1, 2\]: parallel=tp2_pp2 needs 2 numbers .* add up to the 4 blocks of blocks: correct them",
        ),
        ({"stages": 2}, r"plan.stages=2: write a list with the number of blocks on each stage"),
        (
            {"split": {"blocks.*.w": "row"}},
            r"plan.split=\{blocks.\*.w: row\} matches no layer; the module has embedding, .* and \d+ more",
        ),
        (
            {"split": {"blocks.*.q": "rows"}},
            r"plan.split=\{blocks.\*.q: rows\}: a layer is split as one of column, row, vocabulary, replicate",
        ),
        (
            {"activation": {"head": "whole"}},
            r"plan.activation=\{head: whole\}: a column layer's activations are one of local, global",
        ),
        (
            {"activation": {"embedding": "local"}},
            r"embedding is split as vocabulary: remove the line, or add plan.split=\{embedding: column\}",
        ),
        ({"segments": {"head": 2}}, r"plan.segments=\{head: 2\}: write a list with the sizes of the fused parts"),
        (
            {"segments": {"head": [8, 8]}},
            r"plan.segments=\{head: \[8, 8\]\}: the sizes add up to 16, and the layer has 24 outputs: correct them",
        ),
    ],
    ids=[
        "unknown line",
        "chain",
        "stages that do not add up",
        "stages that are no list",
        "no match",
        "unknown kind",
        "unknown activation",
        "activation of no column layer",
        "segments that are no list",
        "segments that do not add up",
    ],
)
def test_plan_sections(plan: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        fit("tp2_pp2", plan=plan)


# ---------------------------------------------------------------------- the data


def test_more_microbatches_than_samples() -> None:
    match = r"parallel=pp2_dp2_mb4: a batch of 3 samples cannot be cut into 4 microbatches: use mb3 or less, or a larger batch"
    with pytest.raises(DataError, match=match):
        fit("pp2_mb4", data=loader(tokens(3)))


class Labelled(Chain):
    """Has labels, and a weight for each position."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self(batch["tokens"]).mean(1)
        return F.cross_entropy(logits, batch["labels"]) + (logits.mean() * batch["positions"]).sum()


def labelled(rows: int, positions: int = 6) -> dict[str, torch.Tensor]:
    return {**tokens(8), "labels": torch.zeros(rows, dtype=torch.long), "positions": torch.ones(positions)}


def test_parts_of_a_batch_with_different_numbers_of_samples() -> None:
    match = (
        r"batch\['labels'\] has 7 rows, and batch\['tokens'\] 8: all tensors of a batch must have its samples along dim 0, and "
        r"training_step fails \(ValueError: Expected input batch_size \(8\) to match target batch_size \(7\).*\): correct"
    )
    with pytest.raises(DataError, match=match):
        fit("pp2_dp2", Labelled(Block), loader(labelled(7)))


def test_an_error_of_the_step_itself_stays_what_it_is() -> None:
    with pytest.raises(KeyError, match="labels"):
        fit("pp2_dp2", Labelled(Block), loader({**tokens(8), "positions": torch.ones(5)}))


class PerSample(Chain):
    """Weighs the samples by a part of the batch that has a row for each of them, and more."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        weights = batch["weights"].reshape(8, 2).sum(1)
        return (self(batch["tokens"]).mean((1, 2)) * weights).sum()


def test_a_part_that_fits_the_whole_batch_only() -> None:
    match = (
        r"training_step runs on the whole batch of 8 samples and fails on a microbatch of 2 \(RuntimeError: .*\): "
        r"batch\['weights'\] has 16 rows, not the number of samples, and goes whole to every microbatch: give it one "
        r"row for each sample, or use one"
    )
    with pytest.raises(DataError, match=match):
        fit("pp2_dp2", PerSample(Block), loader({**tokens(8), "weights": torch.ones(16)}))


class PerToken(Chain):
    """Returns a loss for each token."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        return {"loss": self(batch["tokens"]).square().mean(-1)}


def test_a_loss_that_is_no_scalar() -> None:
    match = r"PerToken.training_step returned a loss of shape \(4, 6\), and the backward starts from one number: .* loss.mean\(\)"
    with pytest.raises(ModelError, match=match):
        fit("pp2_dp2", PerToken(Block))


def test_data_that_can_be_read_only_once() -> None:
    with pytest.raises(DataError, match=r"train_dataloaders is a generator, which can be read only once: .* Give a DataLoader"):
        fit("tp2_pp2", data=(batch for batch in [tokens()]))


def test_no_data() -> None:
    with pytest.raises(DataError, match=r"the DataLoader gives no batch: a run needs at least one"):
        fit("tp2_pp2", data=DataLoader([], batch_size=2))


# ---------------------------------------------------------------------- the Trainer


def test_precision() -> None:
    with pytest.raises(ConfigurationError, match=r"precision=16-true is not supported .*: use precision=16-mixed or bf16-true"):
        fit("tp2_pp2", precision="16-true")


def averaging() -> Any:
    return pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-2)


@pytest.mark.parametrize(("make", "word"), [(averaging, "dp4"), (lambda: pl.callbacks.BackboneFinetuning(), "zero1")])
def test_callbacks_that_go_wrong_on_shards(make: Callable[[], Any], word: str) -> None:
    callback = make()
    with pytest.raises(ConfigurationError, match=rf"{type(callback).__name__} .*: (remove the callback|use zero0), or"):
        fit(word, callbacks=[callback])


def test_batch_norm_over_ranks() -> None:
    class Normed(Chain):
        def __init__(self) -> None:
            super().__init__(Block)
            self.norm = nn.BatchNorm1d(16)

    with pytest.raises(ConfigurationError, match="sync_batchnorm=True is not supported: use GroupNorm or LayerNorm"):
        fit("dp4", Normed(), sync_batchnorm=True)
