"""Models and steps that once went wrong, each by a story of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_par.errors import ModelError
from lightning_par.host.strategy import HybridParallelStrategy
from lightning_par.layout import parse_layout
from lightning_par.prepare import prepare_plan
from tests.models import LENGTH, VOCABULARY, adamw, make_batch
from tests.parity import Steps, check_parity
from tests.ranks import run_ranks

WIDTH, HEADS = 32, 4
Block = Callable[[], nn.Module]


class Plain(nn.Module):
    """Attention without a bias on the keys, whose gradient would be rounding noise, and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.heads(layer(self.norm(x))) for layer in (self.q, self.k, self.v))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.mlp(x)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class ByName(Plain):
    """Every argument given by its name, a tensor with values added inside the product as BLOOM does."""

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        view = torch.reshape(input=x, shape=(*x.shape[:2], HEADS, WIDTH // HEADS))
        return torch.transpose(input=view, dim0=1, dim1=2)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        b, h, t, d = q.shape
        slopes = torch.arange(t, dtype=q.dtype).expand(b * h, 1, t)
        scores = slopes.baddbmm(batch1=q.reshape(-1, t, d), batch2=k.reshape(-1, t, d).mT, beta=0.1, alpha=d**-0.5)
        return torch.softmax(input=scores.view(b, h, t, t), dim=-1) @ v


class Model(pl.LightningModule):
    """Blocks between an embedding and a head, called as `run` says."""

    def __init__(self, block: Block = Plain) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList([block() for _ in range(4)])

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = block(x)
        return out

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = self.run(block, x)
        logits: torch.Tensor = self.head(x)
        return logits

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self(batch["tokens"])[:, :-1].flatten(0, 1)
        return F.cross_entropy(input=logits, target=batch["tokens"][:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return adamw(self)


class Reentrant(Model):
    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(block, x, use_reentrant=True)
        return out


class Compiled(Model):
    """Compiled by the wrapper and in place."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = torch.compile(block.mlp, backend="eager")  # type: ignore[assignment]
            block.compile(backend="eager")


class ReadsValues(Model):
    """What no dry run on fake tensors can do."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        assert self(batch["tokens"]).detach().argmax(-1).numpy().shape == batch["tokens"].shape
        return super().training_step(batch, batch_idx)


class TorchEncoder(Model):
    """In evaluation nn.TransformerEncoderLayer hands its weights to one fused kernel."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True))

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("validation", self.training_step(batch, batch_idx))


class Manual(Model):
    """Clips and steps on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        optimizer, loss = self.optimizers(), super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 0.1, "norm")
        optimizer.step()
        self.log("loss", loss)
        return loss


def test_a_later_stage_keeps_gradients_under_reentrant_checkpoints_and_compiled_blocks_are_a_chain() -> None:
    """Reentrant checkpointing saw an input that needs no gradient, and the first block of the stage was not trained."""
    check_parity({"reentrant": Reentrant, "compiled": Compiled}, "pp2")


def test_calls_by_name_compiled_modules_and_steps_that_read_values_are_split_over_tp() -> None:
    """Rules took arguments by position; compiled layers stayed whole in silence; a fake failure was blamed on the split."""
    check_parity({"by_name": lambda: Model(ByName), "compiled": Compiled, "reads_values": ReadsValues}, "tp2")
    plan = prepare_plan(Compiled(), make_batch(0, 8), parse_layout("tp2").resolve(2))
    assert {layer.kind for layer in plan.layers if "mlp" in layer.name} == {"column", "row"}


def _host(world_size: int, **options: Any) -> pl.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    if world_size > 1:
        options["strategy"] = HybridParallelStrategy("tp2", print_plan=False)
    torch.manual_seed(0)
    return pl.Trainer(accelerator="cpu", devices=world_size, **dict.fromkeys(quiet, False), **options)


def _evaluate(rank: int, world_size: int) -> tuple[float, float]:
    batches: DataLoader[Any] = DataLoader(Steps(1), batch_size=None)
    validation = _host(world_size).validate(TorchEncoder(), batches, verbose=False)[0]["validation"]
    manual = _host(world_size, max_steps=2)
    manual.fit(Manual(), batches)
    return float(validation), float(manual.callback_metrics["loss"])


def test_tp_evaluates_torch_encoder_layers_and_runs_manual_optimization_as_one_process() -> None:
    """The fused kernel multiplied shards without a sum, and the dry run of a manual step clipped gradients of no mesh."""
    alone = _evaluate(0, 1)
    for found in run_ranks(_evaluate, 2):
        assert found == pytest.approx(alone, rel=1e-5)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(LENGTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(x)


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


def _scaled_block() -> nn.Module:
    return nn.Sequential(Scaled(WIDTH, WIDTH), nn.GELU(), Scaled(WIDTH, WIDTH))


@pytest.mark.parametrize(
    ("block", "word", "text"),
    [
        (Normalised, "pp2", "blocks.0.norm normalises over the samples of a batch, and 4 microbatches would each have statistics"),
        (_scaled_block, "tp2", r"leave this layer whole in the plan: .*blocks\.\*\.0.*replicate.*blocks\.\*\.2.*replicate"),
    ],
)
def test_what_cannot_be_kept_is_an_error_that_says_what_to_do(block: Block, word: str, text: str) -> None:
    """BatchNorm saw microbatches for batches, and the error of a replaced forward named no layer and no line."""
    with pytest.raises(ModelError, match=text):
        prepare_plan(Model(block), make_batch(0, 8), parse_layout(word).resolve(2))


class Gained(nn.Module):
    """Multiplies split activations by a vector of the whole width, which fails on local sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gain = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x) * self.gain)


def test_a_dry_run_that_fails_on_purpose_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """torch wrote the traceback of every fake operation that did not fit, where the plan only looked for another way."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)
    try:
        prepare_plan(Model(Gained), make_batch(0, 8), parse_layout("tp2").resolve(2))
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
