"""A small GPT, as one would write it for one device: nothing here knows of ranks, stages or shards."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class GPT(nn.Module):
    """Decoder-only transformer: pre-norm blocks, rotary positions, no biases.

    Args:
        vocab_size: number of tokens; 256 for bytes.
        width: size of the hidden state.
        depth: number of blocks.
        heads: attention heads; divides ``width`` into even parts.
        dropout: fraction of each block's updates dropped in training.
    """

    def __init__(self, vocab_size: int = 256, width: int = 128, depth: int = 4, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.head_size = width // heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self._initialise(depth)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, vocab_size] of the token that follows each of ``tokens`` [B, T]."""
        angles = rotary_angles(tokens.shape[1], self.head_size, tokens.device)
        hidden = self.embedding(tokens)  # [B, T, width]
        for block in self.blocks:
            hidden = block(hidden, angles)
        return self.head(self.norm(hidden))

    def _initialise(self, depth: int) -> None:
        """Keep the variance of activations near 1, and the first prediction near uniform: a loss of ln vocab_size."""
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.head.weight, std=0.02)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("output.weight", "down.weight")):  # 2 x depth of these add up in the hidden state
                nn.init.normal_(parameter, std=(2 * depth * parameter.shape[1]) ** -0.5)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


class Block(nn.Module):
    """Attention and MLP, each on the normed hidden state and added to it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp = MLP(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), angles))
        return hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_size = width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        query, key, value = (self._split_heads(layer(hidden)) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(rotate(query, angles), rotate(key, angles), value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))  # [B, heads, T, head_size] -> [B, T, width]

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], -1, self.head_size).transpose(1, 2)  # [B, T, width] -> [B, heads, T, head_size]


class MLP(nn.Module):
    """Two layers, four times wider in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(hidden)))


def rotary_angles(length: int, head_size: int, device: torch.device) -> torch.Tensor:
    """Angle [length, head_size / 2] of each position in each plane of a head (RoFormer, arXiv 2104.09864, section 3.2.2)."""
    planes = torch.arange(0, head_size, 2, device=device) / head_size
    return torch.outer(torch.arange(length, device=device), 10000.0**-planes)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn the planes (i, i + head_size / 2) of ``x`` [B, heads, T, head_size] by ``angles``, in the dtype of ``x``."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
