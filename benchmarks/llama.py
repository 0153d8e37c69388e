"""The model on which all systems are counted: transformers' Llama, small and random, and its truth in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, LENGTH, WIDTH, INNER, HEADS, VOCABULARY = 2, 16, 64, 96, 8, 128
# Layers by the dim along which tensor parallelism cuts their weights.
COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
_OUTSIDE = ("model.embed_tokens", "lm_head")  # each system cuts these as it likes
TOLERANCE = 1e-5


class LanguageModel(pl.LightningModule):
    """A causal language model of transformers, trained as its documentation shows."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss


def make_llama(depth: int, kv_heads: int, width: int = WIDTH, inner: int = INNER, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """A model of ``depth`` decoder layers with separate q, k, v, gate and up weights; the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
    )
    return LlamaForCausalLM(config)


def make_tokens() -> torch.Tensor:
    """``[BATCH, LENGTH]``, the same at every call."""
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Truth:
    """What one process computes.

    Attributes:
        loss: of `make_tokens`.
        gradients: of every weight, by name.
    """

    loss: float
    gradients: dict[str, torch.Tensor]

    def check(self, loss: torch.Tensor, model: torch.nn.Module, rank: int, tp: int) -> None:
        """Hold the loss and this rank's part of the gradients, but for embedding and head, against the truth.

        Every system cuts a weight into ``tp`` equal parts in order, so the part of a rank is known without asking the system.

        Raises:
            ValueError: what differs, by how much.
        """
        _check_close("loss", torch.as_tensor(self.loss), loss.detach())
        for name, parameter in model.named_parameters():
            if not name.startswith(_OUTSIDE):
                whole, dim = self.gradients[name], _cut_dim(name)
                _check_close(name, whole if dim is None else whole.chunk(tp, dim)[rank], _local(parameter))


def compute_truth(depth: int, kv_heads: int) -> Truth:
    """Loss and gradients of the whole model in this process."""
    model = make_llama(depth, kv_heads)
    loss = LanguageModel(model).training_step(make_tokens(), 0)
    loss.backward()
    return Truth(loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def _cut_dim(name: str) -> int | None:
    layer = name.removesuffix(".weight")
    return 0 if layer.endswith(COLUMNS) else 1 if layer.endswith(ROWS) else None


def _local(parameter: Any) -> torch.Tensor:
    """The gradient of what this rank holds. Collective where a DTensor's gradient is still to be summed."""
    grad = parameter.grad
    return grad.redistribute(placements=parameter.placements).to_local() if isinstance(grad, DTensor) else grad


def _check_close(what: str, truth: torch.Tensor, found: torch.Tensor) -> None:
    if found.shape != truth.shape:
        raise ValueError(f"{what}: shape {list(found.shape)} instead of {list(truth.shape)}")
    error = float((found.double() - truth.double()).norm() / truth.double().norm())
    if not error <= TOLERANCE:
        raise ValueError(f"{what}: relative error {error:.1e} against one process, more than {TOLERANCE}")
