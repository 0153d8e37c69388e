"""Every precision under every ZeRO stage on every mesh trains as one process does, written with plain torch, in that precision."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import transformers  # noqa: F401
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_par.host.strategy import HybridParallelStrategy
from lightning_par.layout import Layout
from lightning_par.loss_scale import LossScale
from tests.models import MODELS, VOCABULARY, ByteModel, adamw, make_batch
from tests.parity import MakeModel, Run, Steps, assemble, compare, fit, relative_error, train_rank
from tests.plain import check_precisions, frozen_block, resolved, train_plainly
from tests.ranks import run_ranks

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
SETTINGS: dict[str, Any] = {"init_scale": 2.0**10, "growth_interval": 2}
NUM_STEPS, BAD_STEP, WIDTH = 6, 2, 32


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("pytorch_lightning", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def words(mesh: str) -> list[str]:
    return [f"{mesh}_zero{stage}_mb2" for stage in range(4)]


def test_two_stages_and_two_replicas() -> None:
    check_precisions(frozen_block, words("pp2_dp2"), PRECISIONS)


class Narrow(nn.Module):
    """A block without a residual: under autocast it gives the half precision in which it computes.

    What it multiplies by has torch's default dtype: recomputed in another one, it would not go into the layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * torch.ones(WIDTH)).tanh()


class NarrowModel(pl.LightningModule):
    """The embedding gives float32 under autocast, its blocks do not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList([Narrow() for _ in range(4)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch["tokens"][:, :-1]).flatten(0, 1), batch["tokens"][:, 1:].flatten())

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(batch["tokens"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


@pytest.mark.parametrize("options", [{}, {"schedule": "zb-h1"}, {"recompute": "full"}], ids=str)
def test_stages_whose_hidden_state_changes_its_dtype(options: dict[str, Any]) -> None:
    check_precisions(NarrowModel, ["pp2_mb4"], PRECISIONS[1:], **options)


def predict(rank: int, world_size: int) -> dict[str, np.ndarray]:
    """Predictions on each rank; arrays, because tensors cannot leave a process that ends."""
    found = {}
    for precision in PRECISIONS:
        torch.manual_seed(0)
        strategy = "auto" if world_size == 1 else HybridParallelStrategy("pp2_mb4", print_plan=False)
        trainer = pl.Trainer(
            accelerator="cpu", devices=world_size, strategy=strategy, precision=precision, logger=False, enable_progress_bar=False
        )
        (whole,) = trainer.predict(NarrowModel(), DataLoader([make_batch(0, 8)], batch_size=None))
        assert whole.dtype is (torch.float32 if precision == "32-true" else torch.bfloat16)
        found[precision] = whole.float().numpy()
    return found


def test_predictions_are_those_of_the_stock_trainer() -> None:
    (stock,) = run_ranks(predict, 1)
    for ours in run_ranks(predict, 2):
        for precision, expected in stock.items():
            np.testing.assert_allclose(ours[precision], expected, rtol=1e-6, err_msg=precision)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [{"reduce": "microbatch"}, {"offload_optimizer": "cpu"}], ids=str)
def test_every_way_to_keep_gradients(zero: dict[str, Any]) -> None:
    check_precisions(frozen_block, words("pp2_dp2")[2:], PRECISIONS[1:], zero=zero)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp2_dp2", "tp2_pp2_dp2", "pp2_vp2_dp2", "tp2_sp_dp2"])
def test_every_mesh(mesh: str) -> None:
    check_precisions(frozen_block, words(mesh), PRECISIONS, timeout=280)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["pp2_mb4", "pp2_dp2_zero2_mb8"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model(name: str, word: str) -> None:
    check_precisions(MODELS[name], [word], PRECISIONS[1:])


@pytest.mark.slow
@pytest.mark.parametrize("word", ["tp2_mb2", "tp2_pp2_sp_mb2", "tp2_pp2_dp2_zero3_mb2"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_over_tp(name: str, word: str) -> None:
    """One step: rounded independently, some of these drift apart faster than by the error of one run (Gemma 2's norms)."""
    check_precisions(MODELS[name], [word], PRECISIONS[1:], steps=1)


def half(**settings: Any) -> MixedPrecision:
    """float16 on the CPU, where ``Trainer(precision="16-mixed")`` would make bf16-mixed of it."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **settings))


class Plant(pl.Callback):
    """Makes one element of one gradient infinite, on one rank, in one step."""

    def __init__(self, is_here: bool) -> None:
        self.is_here = is_here

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_here and trainer.global_step == BAD_STEP:
            plant(BAD_STEP, pl_module)


def plant(step: int, module: nn.Module) -> None:
    if step == BAD_STEP:
        gradient = next(p.grad for p in module.parameters() if p.grad is not None)
        gradient.view(-1)[0] = float("inf")


def train_with_overflow(rank: int, world_size: int, layouts: list[Layout]) -> list[Run]:
    options = {"plugins": half(**SETTINGS), "max_steps": NUM_STEPS, "callbacks": [Plant(rank == 3)]}
    return [train_rank(frozen_block, layout, rank, trainer=options) for layout in layouts]


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    layouts = [resolved(word) for word in words("pp2_dp2")]
    results = run_ranks(train_with_overflow, 4, layouts, timeout=120)
    scaler = torch.amp.GradScaler("cpu", **SETTINGS)
    alone = train_plainly(frozen_block, layouts[0], "16-mixed", NUM_STEPS, scaler, plant)
    assert alone.scales == [2.0**n for n in (10, 11, 10, 10, 11, 11)]  # torch's own rule: it grew, fell and recovered
    alone.norms.pop(BAD_STEP)
    for layout, runs in zip(layouts, zip(*results, strict=True), strict=True):
        for run in runs:
            assert run.scales == alone.scales
            assert not torch.tensor(run.norms.pop(BAD_STEP)).isfinite()
        # a last bit of a float32 weight may round it to another float16, which is 2**-11 of it; the steps that follow see that
        compare(alone, list(runs), layout, dict.fromkeys(("losses", "norms", "weights"), 5e-5))


def train_from_too_large(rank: int, world_size: int, cases: list[tuple[Layout, dict[str, Any]]]) -> list[Run]:
    runs = []
    for layout, options in cases:
        trainer = {"plugins": half(init_scale=2.0**23, growth_interval=4), "max_steps": 2 * NUM_STEPS}
        runs.append(train_rank(frozen_block, layout, rank, trainer=trainer, zero=options))
    return runs


def check_skipped_steps(cases: list[tuple[Layout, dict[str, Any]]]) -> None:
    """Overflows at the start, and whenever the scale grows: each rank has the scales of one process, and its weights."""
    results = run_ranks(train_from_too_large, 4, cases, timeout=250)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**23, growth_interval=4)
    alone = train_plainly(frozen_block, cases[0][0], "16-mixed", 2 * NUM_STEPS, scaler)
    falls = [step for step in range(1, len(alone.scales)) if alone.scales[step] < alone.scales[step - 1]]
    assert falls and max(falls) < 2 * NUM_STEPS - 1, f"no step is skipped, or the last one is: {alone.scales}"
    for (layout, options), runs in zip(cases, zip(*results, strict=True), strict=True):
        for run in runs:
            assert run.scales == alone.scales, (layout, options)
        weights = dict(assemble(list(runs), layout, "weights", total=False))
        for name, expected in alone.weights.items():
            assert relative_error(weights[name], expected) < 1e-3, (layout, options, name)


@pytest.mark.slow
def test_skipped_steps_leave_nothing_behind_with_any_option() -> None:
    """In all the ways in which DeepSpeed may keep reduced gradients in memory."""
    kept: list[dict[str, Any]] = [{"reduce": "microbatch"}, {"offload_optimizer": "cpu"}]
    kept.append({**kept[0], **kept[1]})
    cases = [(resolved(f"pp2_dp2_zero{stage}_mb2"), options) for stage in (2, 3) for options in kept]
    check_skipped_steps([*cases, (resolved("pp2_dp2_zero1_mb2"), kept[1])])


class Same(Steps):
    """One batch for all steps: in the middle of an epoch Lightning begins with the first one again."""

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        return super().__getitem__(0 if step < len(self) else step)


def interrupt(rank: int, world_size: int, folder: Path) -> None:
    """A run that is interrupted after three steps goes on bit for bit, its loss scale and its masters too."""
    for precision, word in (("16-mixed", "pp2_dp2_zero1_mb2"), *(("bf16-true", f"pp2_dp2_zero{stage}_mb2") for stage in (0, 1, 3))):
        layout, weights, scales = resolved(word), [], []
        for part, (first, last) in enumerate([(0, 6), (0, 3), (3, 6)]):
            strategy = HybridParallelStrategy(layout, print_plan=False)
            chosen: dict[str, Any] = {"plugins": half(**SETTINGS)} if precision == "16-mixed" else {"precision": precision}
            loader: DataLoader[Any] = DataLoader(Same(2, layout.coordinate_of(rank).dp), batch_size=None)
            path = folder / f"{word}-{precision}"
            trainer, _, run = fit(
                frozen_block, loader, strategy=strategy, devices=4, max_steps=last, ckpt_path=str(path) if first else None, **chosen
            )
            if part == 1:
                trainer.save_checkpoint(path)
            weights.append([value.clone() for _, value in strategy.states.full_parameters()])
            scales.append(run.scales)
            strategy.states.close()
        assert all(torch.equal(one, other) for one, other in zip(weights[0], weights[2], strict=True)), (precision, word)
        assert not all(torch.equal(one, other) for one, other in zip(weights[0], weights[1], strict=True))
        assert scales[0] == scales[1] + scales[2]
        assert precision != "16-mixed" or scales[0] == [2.0**n for n in (10, 11, 11, 12, 12, 13)]


def test_a_run_that_is_resumed() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(interrupt, 4, Path(folder), timeout=200)


class Manual(pl.LightningModule):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        loss = self.other(self.one(batch["tokens"][:, :4].float() / 100)).square().mean()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss.detach()}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.one, self.other)]


class Scheduled(ByteModel):
    """With a learning rate that changes at each step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


def same_as_stock(rank: int, world_size: int) -> None:
    """With skipped steps at the start, because the first scale is far too large."""
    cases: list[tuple[MakeModel, dict[str, Any]]] = [
        (Scheduled, {"accumulate_grad_batches": 2, "max_epochs": 4, "max_steps": -1}),
        (Scheduled, {"gradient_clip_algorithm": "value", "gradient_clip_val": 1e-3, "max_steps": 8}),
        (Manual, {"gradient_clip_val": None, "max_steps": 24}),
    ]
    for make, options in cases:
        found = []
        for strategy in ("auto", HybridParallelStrategy("single", print_plan=False)):
            plugin = half(init_scale=2.0**32, growth_interval=3)
            trainer, module, run = fit(
                make, DataLoader(Steps(1), batch_size=None), strategy=strategy, plugins=plugin, devices=1, **options
            )
            scale = plugin.scaler.get_scale() if strategy == "auto" else strategy.engine.loss_scale.scale
            rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
            found.append((trainer.global_step, scale, rates, run.losses, [p.detach().clone() for p in module.parameters()]))
        stock, ours = found
        assert ours[:3] == stock[:3]
        assert stock[1] < 2.0**32
        torch.testing.assert_close(ours[3:], stock[3:], rtol=1e-6, atol=1e-7)


def test_one_process_skips_and_schedules_as_the_stock_trainer() -> None:
    run_ranks(same_as_stock, 1)


def test_the_scale_follows_the_rule_of_torch() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=2)
    ours, parameter = LossScale.of(scaler), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for value in (1.0, 1.0, float("nan"), 1.0, float("inf"), float("inf"), 1.0, 1.0, 1.0):
        scaler.scale(parameter.sum() * value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ours.update(not torch.tensor(value).isfinite())
        assert ours.scale == scaler.get_scale()
    other = LossScale()
    other.load_state_dict(ours.state_dict())
    assert (other.scale, other.growth_tracker) == (ours.scale, ours.growth_tracker)
