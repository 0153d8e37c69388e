"""Models for pipelines of up to eight stages, and the layouts in which every schedule trains them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from lightning_par.demo.gpt import GPT
from tests.models import LENGTH, VOCABULARY, ByteModel, TransformersModel
from tests.zoo import Translation
from tests.zoo_written import WIDTH, Trained

MakeModel = Callable[[], pl.LightningModule]
DEPTH = 8
LAYOUTS = ("pp2", "pp4", "tp2_pp2", "pp2_dp2_zero1", "pp2_dp2_zero2")


def word_for(schedule: str, layout: str) -> str:
    """The layout word with as many stages on each rank as the schedule has."""
    return f"{layout}_vp2" if schedule in ("interleaved", "interleaved-zb") else layout


def gpt() -> pl.LightningModule:
    module = ByteModel()
    module.network = GPT(vocab_size=VOCABULARY, width=32, depth=DEPTH, heads=4)
    return module


def llama() -> pl.LightningModule:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    return TransformersModel(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=DEPTH, **sizes)))


def gpt2() -> pl.LightningModule:
    """Tied: the first and the last stage hold one weight."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=32, n_layer=DEPTH, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return TransformersModel(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes)))


def t5() -> pl.LightningModule:
    """Two chains, tied embeddings at three places, position biases that the first block of each chain makes for all."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=DEPTH // 2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)
    return Translation(T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes)))


class ModulatedBlock(nn.Module):
    """Shift, scale and gate from a conditioning vector (adaLN of DiT, arXiv 2212.09748, section 3.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.key.bias.requires_grad_(False)  # softmax does not see it: its gradient is rounding noise
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        y = self.norm_1(x) * (1 + scale_1) + shift_1
        q, k, v = (layer(y).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = x + gate_1 * self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm_2(x) * (1 + scale_2) + shift_2
        return x + gate_2 * self.down(F.gelu(self.up(y)))


class Diffusion(Trained):
    """A vector made from time and label goes into every block and into the last layer, as in DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        self.time, self.label = nn.Sequential(nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)), nn.Embedding(5, WIDTH)
        self.blocks = nn.ModuleList([ModulatedBlock() for _ in range(DEPTH)])
        self.norm, self.modulation, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        phases = batch["label"][:, None] * torch.arange(1, 5) / 5
        condition = self.time(torch.cat([phases.sin(), phases.cos()], dim=-1)) + self.label(batch["label"])
        x = self.embedding(batch["tokens"]) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        target = F.one_hot(batch["tokens"] % WIDTH, WIDTH).float()
        return F.mse_loss(self.head(self.norm(x) * (1 + scale) + shift), target)


class Ragged(ByteModel):
    """Predicts rare bytes only: every sample has another number of targets."""

    def __init__(self) -> None:
        super().__init__()
        self.network = GPT(vocab_size=VOCABULARY, width=32, depth=DEPTH, heads=4)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self.network(batch["tokens"][:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rare(batch).flatten(), ignore_index=-1)
        self.log("train_loss", loss)
        return loss


def rare(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The targets of `Ragged`, -1 where there is none."""
    targets = batch["tokens"][:, 1:]
    return targets.masked_fill(targets < 100, -1)


def num_rare(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (rare(batch) >= 0).sum()


MODELS: Mapping[str, MakeModel] = {"gpt": gpt, "llama": llama, "gpt2": gpt2, "t5": t5, "dit": Diffusion, "ragged": Ragged}
OPTIONS: Mapping[str, Mapping[str, Any]] = {"ragged": {"loss_weight": num_rare}}
