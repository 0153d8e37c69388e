"""Hand-written models of the zoo: what people write themselves, each with a trait that tensor parallelism has to see through."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from tests.models import LENGTH, VOCABULARY, adamw

WIDTH, HEADS, DEPTH = 32, 4, 2


class Trained(pl.LightningModule):
    """A module whose step only lacks its ``loss``."""

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


class Decoder(Trained):
    """A causal language model of any blocks, with learned positions."""

    def __init__(self, make_block: Callable[[], nn.Module], is_tied: bool = False) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([make_block() for _ in range(DEPTH)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if is_tied:
            self.embedding.weight = self.head.weight
            nn.init.normal_(self.head.weight, std=0.05)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        tokens = batch["tokens"]
        x = self.embedding(tokens[:, :-1]) + self.positions(torch.arange(LENGTH - 1, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


class FusedBlock(nn.Module):
    """Fused query-key-value split by a constant, views with constant head counts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.width, self.n_head = WIDTH, HEADS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.size()
        q, k, v = self.qkv(self.norm_1(x)).split(self.width, dim=2)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp(self.norm_2(x))


class LocalFusedBlock(nn.Module):
    """Fused projections in views by head size alone, which are right on a rank's own heads too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate_up, self.down = nn.Linear(WIDTH, 128), nn.Linear(64, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Attention(nn.Module):
    """Separate projections and views by head size; keys and values may come from another sequence."""

    def __init__(self, is_causal: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.is_causal = is_causal

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        memory = x if memory is None else memory
        q, k, v = (y.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for y in (self.q(x), self.k(memory), self.v(memory)))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.o(mixed.transpose(1, 2).flatten(2))


class ThreeLayerBlock(nn.Module):
    """An MLP of three Linear layers with a norm per head on queries and keys before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = Attention(is_causal=True)
        self.up, self.middle, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, 64), nn.Linear(64, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(F.silu(self.middle(F.silu(self.up(self.norm_2(x))))))


class ParallelBlock(nn.Module):
    """Attention and MLP side by side from one fused projection, a fused gate, norms of single heads (as in ViT-22B)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH // HEADS), nn.RMSNorm(WIDTH // HEADS)
        self.qkv, self.gate_up = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 128)
        self.out, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(64, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        y = self.norm(x)
        q, k, v = self.qkv(y).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v, is_causal=True)
        gate, up = self.gate_up(y).chunk(2, dim=-1)
        return x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1)) + self.down(F.gelu(gate) * up)


class RelativeBlock(nn.Module):
    """Scores with a bias read from a table for every head and distance (as in Swin), attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.table = nn.Parameter(torch.randn(2 * LENGTH, HEADS) * 0.1)
        distance = torch.arange(LENGTH - 1)[:, None] - torch.arange(LENGTH - 1)[None]
        self.register_buffer("distance", distance + LENGTH)
        self.register_buffer("future", distance < 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).reshape(batch, length, 3, HEADS, width // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * (width // HEADS) ** -0.5 + self.table[self.distance].permute(2, 0, 1)
        mixed = scores.masked_fill(self.future, float("-inf")).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm_2(x))))


class EncoderBlock(nn.Module):
    """Pre-norm attention to the sequence itself, and to another one where it is given."""

    def __init__(self, is_decoder: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(is_causal=is_decoder)
        self.cross, self.norm_cross = (Attention(), nn.LayerNorm(WIDTH)) if is_decoder else (None, None)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        if self.cross is not None and self.norm_cross is not None:
            x = x + self.cross(self.norm_cross(x), memory)
        return x + self.mlp(self.norm_2(x))


class Translator(Trained):
    """Two chains: an encoder of the reversed tokens, and a decoder that attends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.encoder = nn.ModuleList([EncoderBlock(is_decoder=False) for _ in range(DEPTH)])
        self.decoder = nn.ModuleList([EncoderBlock(is_decoder=True) for _ in range(DEPTH)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        tokens = batch["tokens"]
        positions = self.positions(torch.arange(LENGTH, device=tokens.device))
        memory = self.embedding(tokens.flip(1)) + positions
        for block in self.encoder:
            memory = block(memory)
        x = self.embedding(tokens[:, :-1]) + positions[:-1]
        for block in self.decoder:
            x = block(x, memory)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


class PatchEncoder(Trained):
    """Pictures cut into patches by a convolution, a class token before them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, kernel_size=4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.1)
        self.positions = nn.Parameter(torch.randn(1, 1 + (LENGTH // 4) ** 2, WIDTH) * 0.1)
        self.blocks = nn.Sequential(*[EncoderBlock(is_decoder=False) for _ in range(DEPTH)])
        self.norm, self.classify = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        line = batch["tokens"].float() / VOCABULARY
        x = self.patches(line[:, None, :, None] * line.flip(1)[:, None, None, :]).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return F.cross_entropy(self.classify(self.norm(self.blocks(x))[:, 0]), batch["label"])
