"""Converted layers equal the whole layers: outputs, every gradient, and no more collectives than needed."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lightning_par.errors import ModelError
from lightning_par.runtime.axis import Axis, LocalAxis, Wait
from lightning_par.runtime.parameter import Split
from lightning_par.tensor import ShardedTensor, SharedInput, convert_embedding, convert_linear
from lightning_par.tensor.embedding import VocabularyParallelEmbedding
from lightning_par.tensor.linear import ColumnParallelLinear
from tests.axes import tp_axis
from tests.ranks import run_ranks

D, HEADS, V = 24, 6, 31  # the vocabulary divides by no number of ranks


class Scaled(nn.Linear):
    """A user's layer that adds to ``nn.Linear``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


class Replaced(nn.Linear):
    """A user's layer that does not call ``nn.Linear``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 3.0


class Attention(nn.Module):
    """nanoGPT's attention: one fused weight, global sizes everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.size()
        q, k, v = self.c_attn(x).split(D, dim=2)
        q, k, v = (t.view(batch, time, HEADS, width // HEADS).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, time, width))


class Separate(nn.Module):
    """Llama's attention: three column layers read one tensor, with -1 in the views."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(*x.shape[:-1], -1, D // HEADS).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:-1], -1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = ScaledEmbedding(V, D, padding_idx=V - 1)
        self.norm, self.fused, self.separate = nn.LayerNorm(D), Attention(), Separate()
        self.up, self.down = Conv1D(4 * D, D), Conv1D(D, 4 * D)
        self.scaled, self.head = Scaled(D, D), nn.Linear(D, V, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        x = x + self.fused(self.norm(x))
        x = x + self.separate(self.norm(x))
        x = x + self.down(F.gelu(self.up(x)))
        logits = self.head(x + self.scaled(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), ids.view(-1), ignore_index=0)


def plan(axis: Axis, output: Any) -> dict[str, tuple[Split | None, dict[str, Any]]]:
    """Layer name -> how its weight (as [out, in]) is cut, and the options of `convert_linear`."""
    shared = SharedInput()
    column, row = Split(0, (D,)), Split(1, (D,))
    return {
        "fused.c_attn": (Split(0, (D, D, D)), {"kind": "column", "segments": (D, D, D), "output": "global"}),
        "fused.c_proj": (row, {"kind": "row"}),
        **{f"separate.{name}": (column, {"kind": "column", "shared": shared, "output": output}) for name in "qkv"},
        "separate.o": (row, {"kind": "row"}),
        "up": (Split(0, (4 * D,)), {"kind": "column", "output": output}),
        "down": (Split(1, (4 * D,)), {"kind": "row"}),
        "scaled": (row, {"kind": "row"}),
        "head": (Split(0, (V,)), {"kind": "column", "output": "global", "is_padded": True}),
    }


def shard_model(model: nn.Module, axis: Axis, output: Any) -> dict[str, Split]:
    """Replace the weights by their shards and convert the layers; gives the cut of every cut parameter."""
    cuts = {"wte.weight": Split(0, (V,))}
    for name, (cut, keywords) in plan(axis, output).items():
        layer = model.get_submodule(name)
        transposed = not isinstance(layer, nn.Linear)
        assert cut is not None
        cuts[f"{name}.weight"] = Split(1 - cut.dim, cut.segments) if transposed else cut
        if cut.dim == 0 and layer.bias is not None:
            cuts[f"{name}.bias"] = Split(0, cut.segments)
        convert_linear(layer, axis=axis, **keywords)
    convert_embedding(model.wte, axis, V)
    for name, cut in cuts.items():
        owner, _, leaf = name.rpartition(".")
        whole = model.get_parameter(name).data
        setattr(model.get_submodule(owner), leaf, nn.Parameter(cut.shard(whole, axis.size, axis.coordinate)))
    return cuts


def train(rank: int, size: int) -> list[dict[str, Any]]:
    reports = []
    for output in ("local", "global"):
        axis = tp_axis()
        torch.manual_seed(0)
        model = Model().double()
        ids = torch.randint(V, (2, 5))
        ids[0, 0] = V - 1  # the padding row
        expected = model(ids)
        expected.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        sharded = copy.deepcopy(model)
        names = [name for name, _ in sharded.named_parameters()]
        cuts = shard_model(sharded, axis, output)
        assert [name for name, _ in sharded.named_parameters()] == names and len(list(sharded.modules())) == len(
            list(model.modules())
        )
        axis.calls.clear()
        loss = sharded(ids)
        forward = axis.calls["all_reduce"]
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for name, parameter in sharded.named_parameters():
            want = gradients[name] if name not in cuts else cuts[name].shard(gradients[name], size, rank)
            torch.testing.assert_close(parameter.grad, want, msg=lambda text, name=name: f"{name}: {text}")
        reports.append({"forward": forward, "backward": axis.calls["all_reduce"] - forward, "gathers": dict(axis.gathers)})
        with torch.no_grad():
            torch.testing.assert_close(sharded(ids), expected)
    return reports


@pytest.mark.parametrize("size", [2, 3])
def test_a_model_equals_one_process(size: int) -> None:
    for reports in run_ranks(train, size):
        for report in reports:
            # embedding, 2 attentions, mlp, scaled, 2 of the loss
            assert report["forward"] == 7
            # fused, one for q, k and v together, mlp, head
            assert report["backward"] == 4
            assert report["gathers"] == {}


def run_gpt2(rank: int, size: int) -> dict[str, int]:
    axis = tp_axis()
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=V, n_positions=8, n_embd=D, n_layer=1, n_head=HEADS, attn_implementation=attention)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        model = GPT2LMHeadModel(config).double()
        ids = torch.randint(V, (2, 8))
        expected = model(input_ids=ids, labels=ids).loss
        expected.backward()
        block = model.transformer.h[0]
        gradient = Split(1, (D, D, D)).shard(block.attn.c_attn.weight.grad, size, rank)
        model.zero_grad()
        for layer, kind, segments in (
            (block.attn.c_attn, "column", (D, D, D)),
            (block.attn.c_proj, "row", (D,)),
            (block.mlp.c_fc, "column", (4 * D,)),
            (block.mlp.c_proj, "row", (4 * D,)),
        ):
            cut = Split(1 if kind == "column" else 0, segments)
            layer.weight = nn.Parameter(cut.shard(layer.weight.data, size, rank))
            if kind == "column":
                layer.bias = nn.Parameter(Split(0, segments).shard(layer.bias.data, size, rank))
            convert_linear(layer, kind, axis, segments=segments, output="global" if kind == "column" else "local")
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(block.attn.c_attn.weight.grad, gradient)
    return dict(axis.gathers)


def test_gpt2_of_transformers_needs_no_gather() -> None:
    assert run_ranks(run_gpt2, 2) == [{}, {}]


def run_checkpointed(rank: int, size: int) -> None:
    """Recomputing a block draws the same masks and needs no further all-reduce of the shared input's gradient."""
    axis = tp_axis()
    torch.manual_seed(0)
    model = Model()
    shard_model(model, axis, "global")
    x = torch.randn(2, 5, D, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        return model.separate(x) + model.down(F.dropout(F.gelu(model.up(x)), 0.5))

    gradients, calls = [], []
    for run in (
        block,
        functools.partial(checkpoint, block, use_reentrant=False),
        functools.partial(checkpoint, block, use_reentrant=True),
    ):
        torch.manual_seed(1)
        x.grad = None
        axis.calls.clear()
        run(x).square().sum().backward()
        gradients.append(x.grad)
        calls.append(axis.calls["all_reduce"])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    assert calls == [
        4,
        5,
        6,
    ]  # two forward, two backward, and those of the recomputation (which may stop before the last row layer)


def test_activation_checkpointing() -> None:
    run_ranks(run_checkpointed, 2)


def run_inputs(rank: int, size: int) -> None:
    """What else may come into the layers."""
    axis = tp_axis()
    torch.manual_seed(0)
    row, column = nn.Linear(D, 4), nn.Linear(D, 8)
    x = torch.randn(3, D)
    expected_row, expected_column = row(x), column(x)
    row.weight = nn.Parameter(row.weight.data.chunk(size, 1)[rank].contiguous())
    column.weight = nn.Parameter(column.weight.data.chunk(size, 0)[rank].contiguous())
    column.bias = nn.Parameter(column.bias.data.chunk(size, 0)[rank].contiguous())
    convert_linear(row, "row", axis)
    convert_linear(column, "column", axis)
    part = x.chunk(size, 1)[rank]
    sharded = ShardedTensor(part, 1, (D,), axis)
    for given in (part, sharded, x, ShardedTensor(Split(1, (8, 16)).shard(x, size, rank), 1, (8, 16), axis)):
        torch.testing.assert_close(row(given), expected_row)
    torch.testing.assert_close(column(x), expected_column.chunk(size, 1)[rank])
    torch.testing.assert_close(column(sharded), expected_column.chunk(size, 1)[rank])
    assert axis.gathers == {"RowParallelLinear": 1, "ColumnParallelLinear": 1}

    for rows in (V + 1, V, 1):  # divided, padded by one row, and all on the first rank
        embedding = nn.Embedding(-(-rows // size), 4)
        convert_embedding(embedding, axis, rows)
        for outside in (rows, -1):
            with pytest.raises(IndexError, match="index out of range"):
                embedding(torch.tensor([0, outside]))


def test_inputs_of_other_kinds() -> None:
    run_ranks(run_inputs, 2)


def test_shared_input_keeps_nothing() -> None:
    axis = LocalAxis("tp", 2, 0)
    leaf = torch.ones(3, requires_grad=True)
    readers = [nn.Linear(3, 2) for _ in range(3)]
    shared = SharedInput()
    for reader in readers:
        convert_linear(reader, "column", axis, shared=shared)

    def read(x: torch.Tensor) -> list[torch.Tensor]:
        return [shared.read(reader, x, axis)[0] for reader in readers]

    x = leaf * 2
    copies = read(x)
    assert copies[0] is copies[1] is copies[2] is not x
    assert read(x)[0] is not copies[0]  # a new round

    y = leaf * 3
    first, handle = shared.read(readers[0], y, axis)
    assert torch.equal(first, y) and handle is not None
    assert shared.read(readers[1], y, axis)[0] is first
    gone = weakref.ref(first)
    del first, handle, y
    gc.collect()
    assert gone() is None  # a forward that an exception left must not hold its activations

    with torch.no_grad():
        z = leaf * 1
        assert [part is z for part in read(z)] == [True] * 3


class Diary(LocalAxis):
    """Writes down when the sum of a gradient begins and when it is waited for."""

    def __init__(self) -> None:
        super().__init__("tp", 2, 0)
        self.events: list[str] = []

    def begin_all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> Wait:
        self.events.append("begin")
        return lambda: self.events.append("wait")

    def begin_reduce_scatter(self, parts: torch.Tensor) -> tuple[torch.Tensor, Wait]:
        self.events.append("begin")
        return parts[0].clone(), lambda: self.events.append("wait")


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("num_readers", [1, 3])
def test_gradients_of_weights_are_computed_while_the_input_gradient_is_summed(num_readers: int, is_cut: bool) -> None:
    axis = Diary()
    readers = [nn.Linear(4, 2) for _ in range(num_readers)]
    shared = SharedInput()
    for index, reader in enumerate(readers):
        convert_linear(reader, "column", axis, shared=shared)
        reader.weight.register_hook(lambda grad, index=index: axis.events.append(f"weight {index}"))
    leaf = torch.ones(2, 3, 4, requires_grad=True)
    leaf.register_hook(lambda grad: axis.events.append("input"))
    x = ShardedTensor(leaf * 2, 1, (6,), axis) if is_cut else leaf * 2
    sum(reader(x).square().sum() for reader in readers).backward()
    assert axis.events[0] == "begin" and axis.events[-2:] == ["wait", "input"]
    assert sorted(axis.events[1:-2]) == [f"weight {index}" for index in range(num_readers)]


def test_the_class_of_a_converted_module() -> None:
    axis = LocalAxis("tp", 2, 1)
    layer = Scaled(4, 6)
    layer.note = "kept"
    layer.weight = nn.Parameter(torch.ones(3, 4))
    layer.bias = nn.Parameter(torch.zeros(3))
    convert_linear(layer, "column", axis)
    assert isinstance(layer, Scaled) and isinstance(layer, ColumnParallelLinear) and isinstance(layer, nn.Linear)
    assert (layer.out_features, layer.note, list(layer.state_dict())) == (6, "kept", ["weight", "bias"])
    assert torch.equal(layer(torch.ones(1, 4)), torch.full((1, 3), 2.0))
    assert repr(layer) == "Scaled(in_features=4, out_features=6, bias=True, column-parallel over tp=2, local weight (3, 4))"
    assert copy.deepcopy(layer).record.axis is axis
    embedding = nn.Embedding(10, 2)
    convert_embedding(embedding, axis, 10)
    assert isinstance(embedding, VocabularyParallelEmbedding) and "local rows 5" in repr(embedding)


def test_what_cannot_be_converted() -> None:
    axis = LocalAxis("tp", 2, 0)
    with pytest.raises(ModelError, match=r"Replaced\.forward replaces Linear\.forward"):
        convert_linear(Replaced(4, 4), "column", axis)
    with pytest.raises(ModelError, match=r"LayerNorm is no nn\.Linear or Conv1D"):
        convert_linear(nn.LayerNorm(4), "row", axis)
    with pytest.raises(ModelError, match=r"has 5 outputs in segments \(5,\); each must divide by tp=2"):
        convert_linear(nn.Linear(4, 5), "column", axis)
    with pytest.raises(ModelError, match=r"has 4 inputs in segments \(2, 4\)"):
        convert_linear(nn.Linear(4, 5), "row", axis, segments=(2, 4))
    for options, name in (
        ({"max_norm": 1.0}, "max_norm"),
        ({"sparse": True}, "sparse"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
    ):
        with pytest.raises(ModelError, match=f"Embedding with {name} cannot be split over tp"):
            convert_embedding(nn.Embedding(4, 2, **options), axis, 4)
