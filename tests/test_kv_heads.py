"""Fewer key and value heads than ranks: neighbouring ranks hold copies of a head, and the run is that of one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from lightning_par.errors import ModelError, PlanError
from lightning_par.install import install_tensor_parallel
from lightning_par.plan import Plan
from lightning_par.plan.render import render_plan
from tests.axes import tp_axis
from tests.models import VOCABULARY, TransformersModel, make_batch
from tests.parity import MakeModel, check_parity
from tests.planning import plan_of
from tests.ranks import run_ranks
from tests.zoo_written import HEADS, WIDTH, Decoder

SIZE = WIDTH // HEADS
_CONFIG = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Mistral": dict(sliding_window=8),
    "Gemma2": dict(head_dim=SIZE),
    "Phi3": dict(resid_pdrop=0.0),
}


def of_transformers(name: str, kv: int, **options: Any) -> pl.LightningModule:
    import transformers

    settings = {**_CONFIG, **ARCHITECTURES[name], **options}
    config = getattr(transformers, f"{name}Config")(num_key_value_heads=kv, **settings)
    module = TransformersModel(getattr(transformers, f"{name}ForCausalLM")(config))
    for parameter_name, parameter in module.named_parameters():
        if parameter_name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is rounding noise
            parameter.requires_grad_(False)
    return module


# ---------------------------------------------------------------------- hand-written ways, [B, T, WIDTH] to [B, T, WIDTH]


class Grouped(nn.Module):
    """Fused query-key-value of unequal parts, and one of the ways to write grouped attention."""

    def __init__(self, kv: int, take: Callable[[torch.Tensor, int], tuple[torch.Tensor, ...]], attend: Callable[..., Any]) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, (HEADS + 2 * kv) * SIZE, bias=False), nn.Linear(WIDTH, WIDTH)
        self.kv, self.take, self.attend = kv, take, attend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        return x + self.out(self.attend(*self.take(self.qkv(x), self.kv)).transpose(1, 2).reshape(b, t, WIDTH))


def by_slices(y: torch.Tensor, kv: int) -> tuple[torch.Tensor, ...]:
    b, t, _ = y.shape
    ends = (0, WIDTH, WIDTH + kv * SIZE, WIDTH + 2 * kv * SIZE)
    return tuple(y[..., a:z].view(b, t, -1, SIZE).transpose(1, 2) for a, z in pairwise(ends))


def by_heads(y: torch.Tensor, kv: int) -> tuple[torch.Tensor, ...]:
    b, t, _ = y.shape
    return y.view(b, t, HEADS + 2 * kv, SIZE).transpose(1, 2).split([HEADS, kv, kv], dim=1)


def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
    return (q @ k.transpose(-2, -1) / SIZE**0.5).softmax(-1) @ v


def expanded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    b, kv, t, d = k.shape
    k, v = (x[:, :, None].expand(b, kv, HEADS // kv, t, d).reshape(b, HEADS, t, d) for x in (k, v))
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).div(SIZE**0.5).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def in_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def broadcast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    b, kv, t, d = k.shape
    scores = q.view(b, kv, HEADS // kv, t, d) @ k[:, :, None].transpose(-2, -1) / SIZE**0.5
    return (scores.softmax(-1) @ v[:, :, None]).view(b, HEADS, t, d)


def by_groups(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q = q.unflatten(1, (k.shape[1], -1))
    weights = torch.einsum("bhgqd,bhkd->bhgqk", q, k).div(SIZE**0.5).softmax(-1)
    return torch.einsum("bhgqk,bhkd->bhgqd", weights, v).flatten(1, 2)


WRITTEN = {
    "slices, repeated": (by_slices, repeated),
    "slices, in the kernel": (by_slices, in_kernel),
    "heads, expanded": (by_heads, expanded),
    "heads, broadcast": (by_heads, broadcast),
    "heads, by groups": (by_heads, by_groups),
}


def written(way: str, kv: int) -> pl.LightningModule:
    take, attend = WRITTEN[way]
    return Decoder(lambda: Grouped(kv, take, attend))


def models(kv: int) -> dict[str, MakeModel]:
    return {
        **{f"{name}, {kv} key heads": partial(of_transformers, name, kv) for name in ARCHITECTURES},
        **{f"{way}, {kv} key heads": partial(written, way, kv) for way in WRITTEN},
    }


def test_four_ranks_train_as_one_process() -> None:
    check_parity(models(1) | models(2), "tp4", timeout=280)


def test_two_ranks_and_two_stages_train_as_one_process() -> None:
    """Over a pipeline, with an embedding that is tied to the head on another stage."""
    makers = {name: partial(of_transformers, name, 1, tie_word_embeddings=True) for name in ("Llama", "Gemma2", "Phi3")}
    check_parity({**makers, "slices, repeated": partial(written, "slices, repeated", 1)}, "tp2_pp2")


@pytest.mark.slow
def test_hidden_states_in_parts_train_as_one_process() -> None:
    check_parity(models(1) | models(2), "tp4_sp", timeout=280)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_partitioned_optimizer_states_train_as_one_process(zero: int) -> None:
    """The norm counts a copy for its share in fragments that begin anywhere."""
    check_parity({name: partial(of_transformers, name, 2) for name in ("Llama", "Phi3")}, f"tp4_dp2_zero{zero}", timeout=280)


# ---------------------------------------------------------------------- what it costs


def communication(rank: int, size: int, plans: dict[str, Plan]) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Gathers, and collectives of a forward and a backward, with each number of key heads."""
    found = []
    for kv in (HEADS, 2, 1):
        for name, make in models(kv).items():
            if name in plans:
                module, axis = make(), tp_axis()
                install_tensor_parallel(module, plans[name], axis)
                module.__dict__["log"] = lambda *args: None
                module.training_step(make_batch(0, 2), 0).backward()
                found.append((dict(axis.gathers), dict(axis.calls)))
    return found


@pytest.mark.parametrize("name", ["Llama", "Phi3", "slices, in the kernel", "heads, broadcast", "heads, by groups"])
def test_copies_cost_no_gathers_and_no_more_reductions(name: str) -> None:
    makers = models(HEADS) | models(2) | models(1)
    plans = {key: plan_of(make(), "tp4", make_batch(0, 2)) for key, make in makers.items() if key.startswith(f"{name}, ")}
    for found in run_ranks(communication, 4, plans):
        assert len(found) == len(plans) == 3
        assert all(gathers == {} and calls == found[0][1] for gathers, calls in found)


# ---------------------------------------------------------------------- the plan


def copies_of(kv: int, word: str, queries: int = HEADS) -> dict[str, tuple[int, ...]]:
    module = of_transformers("Llama", kv, num_attention_heads=queries, hidden_size=queries * SIZE, intermediate_size=96)
    return {layer.name.rsplit(".")[-1]: layer.copies for layer in plan_of(module, word, make_batch(0, 2)).layers if layer.copies}


def test_key_heads_have_copies_where_they_are_fewer_than_ranks() -> None:
    assert copies_of(2, "tp2") == {}
    assert copies_of(2, "tp4") == {"k_proj": (2,), "v_proj": (2,)}
    assert copies_of(1, "tp4") == {"k_proj": (4,), "v_proj": (4,)}
    assert copies_of(3, "tp6", queries=12) == {"k_proj": (2,), "v_proj": (2,)}
    for way in WRITTEN:
        plan = plan_of(written(way, 1), "tp4", make_batch(0, 2))
        assert {layer.copies for layer in plan.layers if layer.name.endswith("qkv")} == {(1, 4, 4)}


def test_a_region_with_copies_has_global_shapes() -> None:
    plan = plan_of(of_transformers("Llama", 2), "tp4", make_batch(0, 2))
    shown = {layer.name.rsplit(".")[-1] for layer in plan.layers if layer.kind == "column" and layer.activation == "global"}
    assert shown == {"q_proj", "k_proj", "v_proj", "lm_head"}
    assert "column: 16/4 x 32, in 2 copies" in render_plan(plan)
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("queries", "kv", "word", "words"),
    [
        (12, 3, "tp4", "k_proj has 3 heads, which 4 tensor-parallel ranks cannot share equally; tp 1, 3, 6, 12 would work"),
        (6, 2, "tp4", "q_proj has 6 heads, which 4 tensor-parallel ranks cannot share equally; tp 1, 2, 3, 6 would work"),
        (2, 2, "tp4", "q_proj has 2 heads, which 4 tensor-parallel ranks cannot share equally; tp 1, 2 would work"),
    ],
)
def test_heads_that_cannot_be_shared(queries: int, kv: int, word: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        copies_of(kv, word, queries)


def test_local_activations_of_copied_heads_are_refused() -> None:
    overrides = {"activation": {"*.k_proj": "local"}}
    with pytest.raises(PlanError, match=r"plan.activation=\{model.model.layers.0.self_attn.k_proj: local\}: there are fewer key"):
        plan_of(of_transformers("Llama", 2), "tp4", make_batch(0, 2), overrides)
