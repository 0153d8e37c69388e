"""Models that nobody prepared: architectures of transformers with small random configurations, and modules of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from tests.models import LENGTH, VOCABULARY, TransformersModel, adamw

_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
_DECODER = dict(**_SIZES, intermediate_size=64, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_ENCODER = dict(**_SIZES, intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=5)
_NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)

# name of the architecture: its configuration, but for the vocabulary
_LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "Qwen2": _DECODER,
    "Qwen3": dict(**_DECODER, head_dim=8),
    "Mistral": dict(**_DECODER, sliding_window=8),
    "Phi3": dict(**_DECODER, resid_pdrop=0.0),
    "Olmo2": _DECODER,
    "Starcoder2": dict(**_DECODER, residual_dropout=0.0, embedding_dropout=0.0),
    "Cohere": _DECODER,
    "GPTNeoX": dict(**_SIZES, intermediate_size=64),
    "GPTJ": dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=32, **_NO_DROPOUT),
    "OPT": dict(**_SIZES, ffn_dim=64, max_position_embeddings=32, dropout=0.0, word_embed_proj_dim=32),
    "Bloom": dict(hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0),
}
_CLASSIFIERS: dict[str, dict[str, Any]] = {
    "Bert": _ENCODER,
    "Roberta": _ENCODER,
    "DistilBert": dict(
        dim=32, hidden_dim=64, n_layers=2, n_heads=4, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=5
    ),
}


class Classifier(pl.LightningModule):
    """A sequence classifier of transformers, with a padding mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        mask = (batch["tokens"] != 0).long()
        loss: torch.Tensor = self.model(input_ids=batch["tokens"], attention_mask=mask, labels=batch["label"]).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


class Images(pl.LightningModule):
    """An image classifier on pictures drawn from the tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        line = batch["tokens"].float() / VOCABULARY
        picture = line[:, None, :, None] * line.flip(1)[:, None, None, :]
        output = self.model(picture.expand(-1, 3, -1, -1) + torch.tensor([0.0, 0.1, 0.2])[:, None, None])
        return F.cross_entropy(output if isinstance(output, torch.Tensor) else output.logits, batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


class TorchEncoder(pl.LightningModule):
    """torch's own encoder layers under a causal mask."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.embedding, self.positions = nn.Embedding(VOCABULARY, 32), nn.Embedding(LENGTH, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, VOCABULARY)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        tokens = batch["tokens"]
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        hidden = self.encoder(self.embedding(tokens) + self.positions(torch.arange(LENGTH)), mask=mask, is_causal=True)
        return F.cross_entropy(self.head(hidden)[:, :-1].reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


class FusedBlock(nn.Module):
    """Fused query-key-value split by a constant, views with constant head counts."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.width, self.heads = width, heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.size()
        q, k, v = self.qkv(self.norm_1(x)).split(self.width, dim=2)
        q, k, v = (part.view(b, t, self.heads, c // self.heads).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).contiguous().view(b, t, c))
        return x + self.mlp(self.norm_2(x))


class FusedDecoder(pl.LightningModule):
    """A small decoder of `FusedBlock` with a head tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, 32), nn.Embedding(LENGTH, 32)
        self.blocks = nn.ModuleList([FusedBlock(32, 4) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, VOCABULARY, bias=False)
        self.embedding.weight = self.head.weight
        nn.init.normal_(self.head.weight, std=0.05)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        tokens = batch["tokens"]
        x = self.embedding(tokens[:, :-1]) + self.positions(torch.arange(LENGTH - 1))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


class ResidualBlock(nn.Module):
    """Two convolutions: nothing here for tensor parallelism to split."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm_1, self.norm_2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.norm_2(self.conv_2(F.relu(self.norm_1(self.conv_1(x))))))


def _residual_network() -> nn.Module:
    blocks = nn.Sequential(*[ResidualBlock(8) for _ in range(4)])
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def _vision_transformer() -> nn.Module:
    config = transformers.ViTConfig(image_size=16, patch_size=4, **_ENCODER)
    return transformers.ViTForImageClassification(config)


def _of_transformers(name: str, kind: str, wrap: Callable[[nn.Module], Any], config: dict[str, Any]) -> Any:
    settings = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **config)
    return _without_key_biases(wrap(getattr(transformers, f"{name}For{kind}")(settings)))


def _without_key_biases(module: pl.LightningModule) -> pl.LightningModule:
    """Freeze biases of keys: softmax does not see them, so their gradient is rounding noise that no two runs share."""
    for name, parameter in module.named_parameters():
        if name.endswith(("key.bias", "k_proj.bias", "k_lin.bias")):
            parameter.requires_grad_(False)
    return module


ZOO: dict[str, Callable[[], pl.LightningModule]] = {
    **{
        name: lambda n=name, c=config: _of_transformers(n, "CausalLM", TransformersModel, c)
        for name, config in _LANGUAGE_MODELS.items()
    },
    **{
        name: lambda n=name, c=config: _of_transformers(n, "SequenceClassification", Classifier, c)
        for name, config in _CLASSIFIERS.items()
    },
    "ViT": lambda: _without_key_biases(Images(_vision_transformer())),
    "ResNet": lambda: Images(_residual_network()),
    "TransformerEncoder": lambda: TorchEncoder(norm_first=False),
    "TransformerEncoder, norm first": lambda: TorchEncoder(norm_first=True),
    "fused decoder": FusedDecoder,
}  # type: ignore[misc]
