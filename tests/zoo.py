"""Models that nobody prepared: architectures of transformers with small random configurations, modules of torch, hand-written ones.

`ZOO` has them all by name; `DECODERS`, `ENCODERS` and `ENCODER_DECODERS` are its parts. The last have two chains of blocks, of
which the second reads the first one's result in every block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from tests.models import LENGTH, VOCABULARY, TransformersModel, encoder, gpt, gpt2
from tests.zoo_written import (
    Decoder,
    FusedBlock,
    ParallelBlock,
    PatchEncoder,
    RelativeBlock,
    ThreeLayerBlock,
    Trained,
    Translator,
)

MakeModel = Callable[[], pl.LightningModule]

_SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
_DECODER = dict(**_SIZES, intermediate_size=64, num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_GROUPED = {**_DECODER, "num_attention_heads": 8}  # two query heads for each key head
_ENCODER = dict(**_SIZES, intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=5)
_NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
_T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)

# name of the architecture, before the comma: its configuration; a vocabulary is added
_LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "Llama": _GROUPED,
    "Llama, one key head": {**_DECODER, "num_key_value_heads": 1},
    "Llama, 131 tokens": {**_DECODER, "vocab_size": 131},
    "Qwen2": _DECODER,
    "Qwen3": dict(**_GROUPED, head_dim=8),
    "Mistral": dict(**_GROUPED, sliding_window=8),
    "Gemma2": dict(**_DECODER, head_dim=8),
    "Gemma3": dict(**_DECODER, head_dim=8),
    "Phi3": dict(**_DECODER, resid_pdrop=0.0),
    "Phi3, two key heads": {**_DECODER, "num_key_value_heads": 2, "resid_pdrop": 0.0},
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
    "Albert": dict(**_ENCODER, embedding_size=16, classifier_dropout_prob=0.0),
    "DistilBert": dict(
        dim=32, hidden_dim=64, n_layers=2, n_heads=4, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=5
    ),
}


class Classifier(Trained):
    """A sequence classifier of transformers, with a padding mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = (batch["tokens"] != 0).long()
        loss: torch.Tensor = self.model(input_ids=batch["tokens"], attention_mask=mask, labels=batch["label"]).loss
        return loss


class Translation(Trained):
    """An encoder-decoder of transformers that turns tokens round."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        tokens = batch["tokens"]
        loss: torch.Tensor = self.model(input_ids=tokens, attention_mask=(tokens != 0).long(), labels=tokens.flip(1)).loss
        return loss


class Images(Trained):
    """An image classifier on pictures drawn from the tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        line = batch["tokens"].float() / VOCABULARY
        picture = line[:, None, :, None] * line.flip(1)[:, None, None, :]
        output = self.model(picture.expand(-1, 3, -1, -1) + torch.tensor([0.0, 0.1, 0.2])[:, None, None])
        return F.cross_entropy(output if isinstance(output, torch.Tensor) else output.logits, batch["label"])


class TorchEncoder(Trained):
    """torch's own encoder layers under a causal mask."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.embedding, self.positions = nn.Embedding(VOCABULARY, 32), nn.Embedding(LENGTH, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, VOCABULARY)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        tokens = batch["tokens"]
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        hidden = self.encoder(self.embedding(tokens) + self.positions(torch.arange(LENGTH)), mask=mask, is_causal=True)
        return F.cross_entropy(self.head(hidden)[:, :-1].reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))


class ResidualBlock(nn.Module):
    """Two convolutions: nothing here for tensor parallelism to split."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm_1, self.norm_2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.norm_2(self.conv_2(F.relu(self.norm_1(self.conv_1(x))))))


def _residual_network() -> pl.LightningModule:
    blocks = nn.Sequential(*[ResidualBlock(8) for _ in range(4)])
    return Images(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))


def _vision_transformer() -> pl.LightningModule:
    config = transformers.ViTConfig(image_size=16, patch_size=4, **_ENCODER)
    return _without_key_biases(Images(transformers.ViTForImageClassification(config)))


def _of_transformers(name: str, kind: str, wrap: Callable[[nn.Module], pl.LightningModule], config: dict[str, Any]) -> Any:
    name = name.partition(",")[0]
    settings = getattr(transformers, f"{name}{'Text' * (name == 'Gemma3')}Config")(**{"vocab_size": VOCABULARY, **config})
    return _without_key_biases(wrap(getattr(transformers, f"{name}For{kind}")(settings)))


def _without_key_biases(module: pl.LightningModule) -> pl.LightningModule:
    """Freeze biases of keys: softmax does not see them, so their gradient is rounding noise that no two runs share."""
    for name, parameter in module.named_parameters():
        if name.endswith(("key.bias", "k_proj.bias", "k_lin.bias")):
            parameter.requires_grad_(False)
    return module


DECODERS: dict[str, MakeModel] = {
    "our GPT": gpt,
    "GPT2": gpt2,
    **{name: partial(_of_transformers, name, "CausalLM", TransformersModel, config) for name, config in _LANGUAGE_MODELS.items()},
    "TransformerEncoder": lambda: TorchEncoder(norm_first=False),
    "TransformerEncoder, norm first": lambda: TorchEncoder(norm_first=True),
    "fused decoder": lambda: Decoder(FusedBlock, is_tied=True),
    "MLP of three layers": lambda: Decoder(ThreeLayerBlock),
    "attention beside MLP": lambda: Decoder(ParallelBlock),
    "relative positions": lambda: Decoder(RelativeBlock),
}
ENCODERS: dict[str, MakeModel] = {
    **{
        name: partial(_of_transformers, name, "SequenceClassification", Classifier, config) for name, config in _CLASSIFIERS.items()
    },
    "ViT": _vision_transformer,
    "hand-written encoder": encoder,
    "convolutional patches": PatchEncoder,
    "ResNet": _residual_network,
}
ENCODER_DECODERS: dict[str, MakeModel] = {
    "T5": partial(_of_transformers, "T5", "ConditionalGeneration", Translation, _T5),
    "T5, gated": partial(_of_transformers, "T5", "ConditionalGeneration", Translation, {**_T5, "feed_forward_proj": "gated-gelu"}),
    "cross attention": Translator,
}
ZOO: dict[str, MakeModel] = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}
