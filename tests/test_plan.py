"""What is split how, read off the dry run of models that say nothing about it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import transformers
import yaml
from torch import nn

from lightning_par.errors import PlanError
from lightning_par.plan import Plan, render_plan
from lightning_par.plan.partition import partition_blocks
from tests.models import EncoderBlock, gpt2, llama, make_batch
from tests.planning import Block, Chain, kinds, layer_of, plan_of

WIDTH, HEADS = 16, 4
SIZE = WIDTH // HEADS


class Model(pl.LightningModule):
    """A model of transformers with its own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch["tokens"], labels=batch["tokens"]).loss
        return loss


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] to [B, T, H * D], with fewer key heads repeated."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------- column and row


def test_llama() -> None:
    plan = plan_of(llama(), "tp2", make_batch(0, 4))
    assert kinds(plan) == {
        "model.model.embed_tokens": "vocabulary", "model.lm_head": "column",
        "self_attn.q_proj": "column", "self_attn.k_proj": "column", "self_attn.v_proj": "column", "self_attn.o_proj": "row",
        "mlp.gate_proj": "column", "mlp.up_proj": "column", "mlp.down_proj": "row",
    }  # fmt: skip
    readers = {layer.name.rpartition(".")[2]: layer.shared.rpartition(".")[2] for layer in plan.layers if ".0." in layer.name}
    assert readers["k_proj"] == readers["v_proj"] == readers["q_proj"] == "q_proj"
    assert readers["up_proj"] == readers["gate_proj"] == "gate_proj"
    assert {layer.activation for layer in plan.layers if ".layers." in layer.name} == {"local"}


def test_gpt2() -> None:
    plan = plan_of(gpt2(), "tp2", make_batch(0, 4))
    assert kinds(plan) == {
        "model.transformer.wte": "vocabulary", "model.transformer.wpe": "replicate", "model.lm_head": "column",
        "attn.c_attn": "column", "attn.c_proj": "row", "mlp.c_fc": "column", "mlp.c_proj": "row",
    }  # fmt: skip
    assert layer_of(plan, "attn.c_attn").segments == (32, 32, 32)
    weights = {parameter.spec.name: parameter for parameter in plan.parameters}
    tied = weights["model.transformer.wte.weight"]
    assert [alias for alias, _ in tied.aliases] == ["model.transformer.wte.weight", "model.lm_head.weight"]
    assert tied.spec.split is not None and tied.spec.split.dim == 0
    fused = weights["model.transformer.h.0.attn.c_attn.weight"].spec.split
    assert fused is not None and (fused.dim, fused.segments) == (1, (32, 32, 32))  # Conv1D keeps [in, out]


def test_bert() -> None:
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=32
    )
    plan = plan_of(Model(transformers.BertForMaskedLM(config).eval()), "tp2", make_batch(0, 4))
    found = kinds(plan)
    assert {name: kind for name, kind in found.items() if "embeddings" not in name and "cls" not in name} == {
        "attention.self.query": "column", "attention.self.key": "column", "attention.self.value": "column",
        "attention.output.dense": "row", "intermediate.dense": "column", "output.dense": "row",
    }  # fmt: skip
    embeddings = {name.rpartition(".")[2]: kind for name, kind in found.items() if "embeddings" in name}
    assert embeddings == {"word_embeddings": "vocabulary", "position_embeddings": "replicate", "token_type_embeddings": "replicate"}
    assert found["model.cls.predictions.decoder"] == "column" and found["model.cls.predictions.transform.dense"] == "replicate"


def test_bert_with_pooler_and_classifier() -> None:
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=5
    )

    class Classifier(Model):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(input_ids=batch["tokens"], labels=batch["label"]).loss
            return loss

    found = kinds(plan_of(Classifier(transformers.BertForSequenceClassification(config)), "tp2", make_batch(0, 4)))
    assert found["model.bert.pooler.dense"] == found["model.classifier"] == "replicate"
    assert found["attention.self.query"] == "column"


def test_gpt_neox_is_fused_per_head() -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=32
    )
    plan = plan_of(Model(transformers.GPTNeoXForCausalLM(config)), "tp2", make_batch(0, 4))
    fused = layer_of(plan, "attention.query_key_value")
    assert (fused.kind, fused.segments) == ("column", (96,))
    assert kinds(plan)["attention.dense"] == kinds(plan)["mlp.dense_4h_to_h"] == "row"


class ParallelBlock(nn.Module):
    """Attention and MLP read one norm, as in GPT-J."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (-1, SIZE)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.o(attend(q, k, v)) + self.down(F.gelu(self.up(y)))


def test_attention_and_mlp_beside_each_other() -> None:
    plan = plan_of(Chain(ParallelBlock), "tp2")
    assert kinds(plan) == {
        "embedding": "vocabulary", "head": "column", **dict.fromkeys(["q", "k", "v", "up"], "column"), "o": "row", "down": "row"
    }  # fmt: skip
    assert {layer_of(plan, name).shared for name in ("q", "k", "v", "up")} == {"blocks.0.q"}  # one all-reduce for all four


class ThreeLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(WIDTH, 32), nn.Linear(32, 32), nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.three(self.two(self.one(x).relu()).relu())


def test_mlp_of_three_layers() -> None:
    plan = plan_of(Chain(ThreeLayers), "tp2")
    assert [kinds(plan)[name] for name in ("one", "two", "three")] == ["column", "row", "replicate"]
    (note,) = plan.notes
    assert note.startswith("2 x three not split over tp: its output meets the hidden state before a row layer (add in the block)")
    assert note.endswith("GFLOP of the forward; to split it for one more all-reduce, plan.split={blocks.*.three: row}")


class Modulated(nn.Module):
    """Scale and shift computed from a condition, as in diffusion transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.norm = nn.Linear(WIDTH, 2 * WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(x.mean(1, keepdim=True)).chunk(2, -1)
        return x + self.down(F.silu(self.up(self.norm(x) * (1 + scale) + shift)))


def test_what_meets_the_hidden_state_stays_whole() -> None:
    plan = plan_of(Chain(Modulated), "tp2")
    assert [kinds(plan)[name] for name in ("modulation", "up", "down")] == ["replicate", "column", "row"]
    assert any(note.startswith("2 x modulation not split over tp: its output meets the hidden state") for note in plan.notes)


def test_parameters_next_to_split_activations_have_partial_gradients() -> None:
    class Normed(ParallelBlock):
        def __init__(self) -> None:
            super().__init__()
            self.q_norm = nn.LayerNorm(SIZE)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (layer(x).view(*x.shape[:2], *self.heads(layer)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return x + self.o(attend(self.q_norm(q), k, v))

        def heads(self, layer: nn.Module) -> tuple[int, int]:
            return (-1, SIZE)

    class Global(Normed):
        def heads(self, layer: nn.Module) -> tuple[int, int]:
            return (HEADS, SIZE)

    for block, activation, is_partial in ((Normed, "local", True), (Global, "global", False)):
        plan = plan_of(Chain(block), "tp2")
        assert layer_of(plan, "q").activation == activation
        partial = {parameter.spec.name for parameter in plan.parameters if parameter.spec.partial}
        assert partial == ({f"blocks.{i}.q_norm.{name}" for i in (0, 1) for name in ("weight", "bias")} if is_partial else set())


# ---------------------------------------------------------------------- fused outputs


class Fused(nn.Module):
    """One Linear for query, key and value, taken apart by ``take``."""

    def __init__(self, take: Callable[[torch.Tensor], Any], size: int) -> None:
        super().__init__()
        self.qkv, self.out, self.take = nn.Linear(WIDTH, size), nn.Linear(WIDTH, WIDTH), take

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(attend(*self.take(self.qkv(x))))


def by_heads(parts: Any) -> Any:
    return [part.unflatten(-1, (-1, SIZE)).transpose(1, 2) for part in parts]


def slices(y: torch.Tensor) -> Any:
    return by_heads([y[..., :WIDTH], y[..., WIDTH : 2 * WIDTH], y[..., 2 * WIDTH :]])


D, K = WIDTH, WIDTH // 2
FUSED: dict[str, tuple[Callable[[torch.Tensor], Any], tuple[int, ...]]] = {
    "split": (lambda y: by_heads(y.split(D, -1)), (D, D, D)),
    "chunk": (lambda y: by_heads(y.chunk(3, dim=-1)), (D, D, D)),
    "slices": (slices, (D, D, D)),
    "parts first": (lambda y: y.view(*y.shape[:2], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0), (D, D, D)),
    "parts first, unpacked": (lambda y: y.view(*y.shape[:2], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4), (D, D, D)),
    "parts indexed": (
        lambda y: [y.view(*y.shape[:2], 3, HEADS, SIZE)[:, :, i].transpose(1, 2) for i in range(3)], (D, D, D)
    ),
    "grouped queries": (lambda y: by_heads(y.split([D, K, K], -1)), (D, K, K)),
    "heads of three kinds": (
        lambda y: [x.transpose(1, 2) for x in y.view(*y.shape[:2], 8, SIZE).split([4, 2, 2], 2)], (D, K, K)
    ),
    "heads first": (lambda y: y.view(*y.shape[:2], HEADS, 3 * SIZE).transpose(1, 2).chunk(3, -1), (3 * D,)),
    "heads first, then parts": (lambda y: y.view(*y.shape[:2], HEADS, 3, SIZE).permute(3, 0, 2, 1, 4).unbind(), (3 * D,)),
}  # fmt: skip


@pytest.mark.parametrize("way", FUSED)
def test_fused_projections(way: str) -> None:
    take, segments = FUSED[way]
    layer = layer_of(plan_of(Chain(lambda: Fused(take, sum(segments)), depth=1), "tp2", overrides={"chain": "blocks"}), "qkv")
    assert (layer.kind, layer.segments) == ("column", segments)


class Gated(nn.Module):
    def __init__(self, take: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.up, self.down, self.take = nn.Linear(WIDTH, 32), nn.Linear(16, WIDTH), take

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.take(self.up(x))
        return x + self.down(F.silu(gate) * value)


GATES: dict[str, tuple[Callable[[torch.Tensor], Any], tuple[int, ...], str]] = {
    "chunk": (lambda y: y.chunk(2, -1), (16, 16), "local"),
    "unbind of a view": (lambda y: y.view(*y.shape[:2], 2, -1).unbind(2), (16, 16), "local"),
    "halves of a size that is read": (lambda y: (y[..., : y.size(-1) // 2], y[..., y.size(-1) // 2 :]), (16, 16), "local"),
    "every other": (lambda y: (y[..., ::2], y[..., 1::2]), (32,), "global"),
}


@pytest.mark.parametrize("way", GATES)
def test_gated_mlp(way: str) -> None:
    take, segments, activation = GATES[way]
    layer = layer_of(plan_of(Chain(lambda: Gated(take)), "tp2"), "up")
    assert (layer.kind, layer.segments, layer.activation) == ("column", segments, activation)


# ---------------------------------------------------------------------- local or global activations


class Probe(nn.Module):
    """An MLP with ``between`` at its middle, where activations are split."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.between(self.up(x)))


LOCAL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pointwise": lambda y: F.gelu(y) * 2 + 1,
    "views by -1": lambda y: y.view(*y.shape[:2], -1, 8).transpose(1, 2).softmax(-1).transpose(1, 2).flatten(2),
    "einsum over what is whole": lambda y: torch.einsum("btd,bsd->btsd", y, y).mean(2),
}
GLOBAL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a global size in a view": lambda y: y.view(*y.shape[:2], 4, 8).flatten(2),
    "a function without a table entry": lambda y: y.cumsum(1),
    "dropout": lambda y: F.dropout(y, 0.1),
    "softmax along the split dim": lambda y: y.softmax(-1),
    "a mean of everything": lambda y: y * y.mean(),
    "cat along the split dim": lambda y: torch.cat((y[..., : y.size(-1) // 2], y[..., y.size(-1) // 2 :]), -1),
    "a number made of a size": lambda y: y / y.size(-1),
    "a table made of a size": lambda y: y * torch.arange(y.size(-1)),
    "another way on local sizes": lambda y: y.relu() if y.size(-1) > 16 else y.sigmoid(),
    "halves swapped": lambda y: y.view(*y.shape[:2], 2, -1).transpose(2, 3).flatten(2),
}


@pytest.mark.parametrize("name", [*LOCAL, *GLOBAL])
def test_plain_local_tensors_only_where_they_are_right(name: str) -> None:
    between = {**LOCAL, **GLOBAL}[name]
    assert layer_of(plan_of(Chain(lambda: Probe(between)), "tp2"), "up").activation == ("local" if name in LOCAL else "global")


# ---------------------------------------------------------------------- vocabulary


class Tied(Chain):
    def __init__(self) -> None:
        super().__init__(ThreeLayers)
        self.head.weight = self.embedding.weight


class Functional(Chain):
    """The head is no layer."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.embedding.weight)


class Positions(Chain):
    """The position table is larger than the vocabulary."""

    def __init__(self) -> None:
        super().__init__(ThreeLayers)
        self.positions = nn.Embedding(100, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.size(1)))
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


class Classes(Positions):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 5)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Chain(ThreeLayers), {"embedding": "vocabulary", "head": "column"}),
        (Tied, {"embedding": "vocabulary", "head": "column"}),
        (lambda: Functional(ThreeLayers), {"embedding": "replicate"}),
        (Positions, {"embedding": "vocabulary", "positions": "replicate", "head": "column"}),
        (Classes, {"embedding": "vocabulary", "positions": "replicate", "head": "replicate"}),
    ],
    ids=["untied", "tied", "read functionally", "positions", "classes"],
)
def test_vocabulary(make: Callable[[], nn.Module], expected: dict[str, str]) -> None:
    plan = plan_of(make(), "tp2")
    assert {name: kind for name, kind in kinds(plan).items() if name in ("embedding", "positions", "head")} == expected
    if expected == {"embedding": "replicate"}:
        assert any("its weight is read by linear" in note for note in plan.notes)


# ---------------------------------------------------------------------- stages


def every_cut(blocks: int, stages: int) -> Iterator[list[int]]:
    for cuts in itertools.combinations(range(1, blocks), stages - 1):
        ends = (0, *cuts, blocks)
        yield [b - a for a, b in itertools.pairwise(ends)]


def test_partition_is_the_best_of_all() -> None:
    draw = random.Random(0)
    for _ in range(200):
        blocks = draw.randint(1, 8)
        stages = draw.randint(1, blocks)
        costs = [draw.randint(0, 9) for _ in range(blocks)]
        first, last = draw.randint(0, 12), draw.randint(0, 12)

        def dearest(counts: list[int], costs: list[int] = costs, first: int = first, last: int = last) -> int:
            rest = iter(costs)
            sums = [sum(itertools.islice(rest, count)) for count in counts]
            sums[0] += first
            sums[-1] += last
            return max(sums)

        counts = partition_blocks(costs, stages, first, last)
        assert min(counts) >= 1 and sum(counts) == blocks and len(counts) == stages
        assert dearest(counts) == min(map(dearest, every_cut(blocks, stages)))


def test_equal_blocks_are_shared_equally_and_the_head_counts() -> None:
    assert partition_blocks([1.0] * 8, 4) == [2, 2, 2, 2]
    assert partition_blocks([1.0] * 8, 4, last=1.0) == [3, 2, 2, 1] or max(partition_blocks([1.0] * 8, 4, last=1.0)) <= 3


def test_stages_hold_what_they_read() -> None:
    plan = plan_of(Tied(), "pp2")
    stages = {alias: held for parameter in plan.parameters for alias, held in parameter.aliases}
    assert stages["embedding.weight"] == (0,) and stages["head.weight"] == (1,)
    assert stages["blocks.0.one.weight"] == (0,) and stages["blocks.1.one.weight"] == (1,)
    (tied,) = (p.spec for p in plan.parameters if p.spec.name == "embedding.weight")
    assert tied.stages == (0, 1)


def test_parameters_that_the_step_never_reads_are_held_once() -> None:
    class Unused(ThreeLayers):
        def __init__(self) -> None:
            super().__init__()
            self.never = nn.Linear(3, 3)

    stages = {p.spec.name: p.spec.stages for p in plan_of(Chain(Unused), "pp2").parameters}
    assert stages["blocks.0.never.weight"] == (0,) and stages["blocks.1.never.weight"] == (1,)


# ---------------------------------------------------------------------- overrides, round trip, tables


def test_overrides_win() -> None:
    module = Chain(ThreeLayers, depth=3)
    plan = plan_of(module, "tp2_pp2", overrides={"stages": [1, 2], "split": {"blocks.*.two": "replicate", "head": "replicate"}})
    assert [(stage.first, stage.last) for stage in plan.stages] == [(0, 1), (1, 3)]
    assert [kinds(plan)[name] for name in ("one", "two", "three", "head")] == ["replicate", "replicate", "replicate", "replicate"]


def test_segments_and_activations_can_be_chosen() -> None:
    choice = {"segments": {"blocks.*.up": [16, 16]}, "activation": {"blocks.*.up": "global"}}
    up = layer_of(plan_of(Chain(Block), "tp2", overrides=choice), "up")
    assert (up.segments, up.activation) == ((16, 16), "global")
    assert layer_of(plan_of(Chain(Block), "tp2"), "up").activation == "local"


def test_a_chosen_local_activation_must_be_right() -> None:
    fused = Chain(lambda: Fused(FUSED["split"][0], 3 * WIDTH))
    with pytest.raises(PlanError, match=r"plan.activation=\{blocks.0.qkv: local\}: .*: remove the line"):
        plan_of(fused, "tp2", overrides={"activation": {"blocks.*.qkv": "local"}})


def test_the_chain_can_be_chosen() -> None:
    class Two(Chain):
        def __init__(self) -> None:
            super().__init__(ThreeLayers)
            self.small = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embedding(tokens)
            for block in (*self.blocks, *self.small):
                x = block(x)
            logits: torch.Tensor = self.head(x)
            return logits

    chosen = plan_of(Two(), "pp2", overrides={"chain": "small"}).chain
    assert chosen is not None and chosen.paths == ("small",)


@pytest.mark.parametrize("word", ["single", "tp2", "tp2_pp2", "pp2_dp2_zero1_mb2"])
def test_a_plan_is_data(word: str) -> None:
    plan = plan_of(Tied(), word)
    assert Plan.from_dict(yaml.safe_load(yaml.safe_dump(plan.to_dict()))) == plan


def test_the_tables_name_every_module_and_the_ranks() -> None:
    plan = plan_of(Chain(lambda: EncoderLike(), depth=3), "tp2_pp3")
    text = render_plan(plan, width=200)
    lines = text.splitlines()
    for inner in ("blocks.[0-2]", "qkv", "out", "up", "down", "norm_1", "norm_2"):
        assert sum(f"─ {inner} " in line for line in lines) == 1, inner
    (head,) = (line for line in lines if "─ head " in line)
    assert "column: 24/2 x 16" in head and "│ 2  " in head
    (fused,) = (line for line in lines if "─ qkv " in line)
    assert "column: (16+16+16)/2 x 16" in fused and "│ 0-2 " in fused
    assert "on 6 ranks: tp 2 x pp 3 x dp 1" in lines[0]
    (last,) = (line for line in lines if line.startswith("│ 2 "))
    assert "blocks.2" in last and "│ 4, 5 " in last


class EncoderLike(EncoderBlock):
    def __init__(self) -> None:
        super().__init__(WIDTH, HEADS, 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, torch.ones(x.shape[:2], dtype=torch.bool))
