"""Models for the parity tests: each with one awkward trait, none with any parallel code."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from lightning_par.demo.gpt import GPT

VOCABULARY, LENGTH = 128, 16


class ByteModel(pl.LightningModule):
    """The GPT of the main job, on the tests' batches."""

    def __init__(self) -> None:
        super().__init__()
        self.network = GPT(vocab_size=VOCABULARY, width=32, depth=4, heads=4)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        tokens = batch["tokens"]
        logits = self.network(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


def gpt() -> pl.LightningModule:
    """Separate query, key and value, rotary positions."""
    return ByteModel()


class TransformersModel(pl.LightningModule):
    """A causal language model of transformers, trained as its documentation shows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch["tokens"], labels=batch["tokens"]).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


def llama() -> pl.LightningModule:
    """Grouped queries, untied head, rotary positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return TransformersModel(LlamaForCausalLM(config))


def gpt2() -> pl.LightningModule:
    """Tied head, Conv1D layers, fused query-key-value split by a size that is an attribute."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return TransformersModel(GPT2LMHeadModel(config))


def gemma2() -> pl.LightningModule:
    """Tied head, scaled embedding, soft-capped logits, four norms per block."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2,
    )  # fmt: skip
    return TransformersModel(Gemma2ForCausalLM(config))


class EncoderBlock(nn.Module):
    """Post-norm, fused query-key-value, views with global head counts, attention written out."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads, self.dropout = heads, nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / (c // self.heads) ** 0.5
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        mixed = self.dropout(scores.softmax(-1)) @ v
        x = self.norm_1(x + self.dropout(self.out(mixed.transpose(1, 2).reshape(b, t, c))))
        return self.norm_2(x + self.dropout(self.down(F.gelu(self.up(x)))))


class EncoderClassifier(pl.LightningModule):
    """A hand-written encoder with padding masks and a classification loss."""

    def __init__(self, width: int = 32, depth: int = 4, heads: int = 4, classes: int = 5, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.randn(1, LENGTH, width) * 0.1)
        self.blocks = nn.ModuleList([EncoderBlock(width, heads, dropout) for _ in range(depth)])
        self.classify = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> Any:
        mask = tokens != 0
        x = self.tokens(tokens) + self.positions[:, : tokens.size(1)]
        for block in self.blocks:
            x = block(x, mask)
        return self.classify((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self(batch["tokens"]), batch["label"])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


def encoder() -> pl.LightningModule:
    return EncoderClassifier()


def adamw(module: nn.Module) -> torch.optim.AdamW:
    """AdamW with the usual two groups.

    eps is 1e-4, not 1e-8: where a gradient is about 1e-9 Adam divides noise by noise, and the order of an fp32 sum over
    tp ranks alone then moves a weight by more than the tolerance.
    """
    decay = [p for p in module.parameters() if p.ndim >= 2]
    rest = [p for p in module.parameters() if p.ndim < 2]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, eps=1e-4)


MODELS = {"gpt": gpt, "llama": llama, "gpt2": gpt2, "gemma2": gemma2, "encoder": encoder}


def make_batch(step: int, size: int) -> dict[str, torch.Tensor]:
    """A global batch of ``size`` samples, the same on every rank. Token 0 is padding, at the end of every other sample."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(1, VOCABULARY, (size, LENGTH), generator=generator)
    tokens[::2, -3:] = 0
    return {
        "tokens": tokens,
        "label": torch.randint(0, 5, (size,), generator=generator),
    }
