"""Sequence parallelism: hidden states cut along the sequence between the blocks, and what of a module runs on parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_par.errors import LayoutError, ModelError
from lightning_par.install import install_tensor_parallel
from lightning_par.layout import Layout, parse_layout
from lightning_par.pipeline.action import Action
from lightning_par.pipeline.transport import Transport
from lightning_par.plan import Plan
from lightning_par.plan.render import render_plan
from lightning_par.runtime.axis import LocalAxis
from lightning_par.runtime.parameter import Split
from lightning_par.tensor import SequenceParallel, ShardedTensor, convert_positionwise
from tests import models
from tests.axes import tp_axis
from tests.models import LENGTH, VOCABULARY, adamw
from tests.parity import check_parity, train_rank
from tests.planning import Block, Chain, plan_of
from tests.ranks import run_ranks

MODELS: dict[str, Callable[[], pl.LightningModule]] = {"gpt": models.gpt, "llama": models.llama, "gpt2": models.gpt2}


class Restless(nn.Module):
    """A block that does to a hidden state what no part of it can do alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(width), nn.Parameter(torch.full((width,), 0.9))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.mix = nn.Linear(width, width)
        self.squeeze, self.excite = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        x = x * self.scale + self.mix(x)  # a parameter and a whole Linear on parts
        x = x + self.excite(self.squeeze(x.mean(1, keepdim=True)).relu())  # split layers on one token that all ranks have
        x = x + 0.1 * x.flip(1) + x.mean(1, keepdim=True) + 0.1 * x[:, :1]
        return self.norm(x) + x.cumsum(1) / x.shape[1]  # the same norm twice


class RestlessModel(pl.LightningModule):
    """A norm that is called on replicated tensors too: before the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.blocks = nn.ModuleList([Restless(32) for _ in range(4)])
        self.norm = nn.LayerNorm(32)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x = self.norm(self.embedding(batch["tokens"]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["tokens"][:, 1:].flatten())
        return loss + F.cross_entropy(self.head(x[:, 0])[:, :5], batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


@pytest.mark.parametrize("word", ["tp2_sp", "tp2_sp_pp2"])
def test_the_same_training(word: str) -> None:
    check_parity({**MODELS, "restless": RestlessModel}, word)


def test_the_same_training_with_zero() -> None:
    check_parity({"gpt": models.gpt, "gpt2": models.gpt2}, "tp2_sp_dp2_zero2")


def test_what_runs_on_parts() -> None:
    plan = plan_of(models.llama(), "tp2_sp", models.make_batch(0, 4))
    assert plan.sequence is not None and plan.sequence.dim == 1
    block = "model.model.layers.0"
    assert set(plan.sequence.modules) >= {f"{block}.input_layernorm", f"{block}.post_attention_layernorm", "model.model.norm"}
    assert {p.spec.name for p in plan.parameters if p.spec.partial} == {f"{name}.weight" for name in plan.sequence.modules}
    assert Plan.from_dict(plan.to_dict()) == plan
    assert "sequence: hidden states are cut along dim 1 between the blocks" in render_plan(plan)
    (norm,) = (line for line in render_plan(plan).splitlines() if "─ input_layernorm " in line)
    assert "sequence/2" in norm

    plan = plan_of(RestlessModel(), "tp2_sp", models.make_batch(0, 4))
    partial = {p.spec.name.removeprefix("blocks.0.") for p in plan.parameters if p.spec.partial and "blocks.1" not in p.spec.name}
    assert partial >= {"norm.weight", "norm.bias", "down.bias", "excite.bias", "mix.weight", "mix.bias"}
    assert "scale" not in partial  # read by the block itself, whose rule sums its gradient


def saved_bytes(word: str, depth: int, tp: int) -> int:
    """What autograd saves in one step of a Llama, parameters left out."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=depth, num_attention_heads=4
    )
    module, batch = models.TransformersModel(LlamaForCausalLM(config)), models.make_batch(0, 4)
    module.log = lambda *args: None
    if word != "single":
        install_tensor_parallel(module, plan_of(module, word, batch), LocalAxis("tp", tp, 0))
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved: dict[int, torch.Tensor] = {}  # by memory, alive so that none is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module.training_step(batch, 0)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in weights)


@pytest.mark.parametrize("tp", [2, 4])
def test_a_layer_keeps_its_part_of_the_activations_and_two_gathered_inputs(tp: int) -> None:
    """The inputs of the column layers are kept whole: their weight gradients need them, and gathering them again has a price."""
    whole, cut = (saved_bytes(word, 3, tp) - saved_bytes(word, 2, tp) for word in ("single", f"tp{tp}_sp"))
    hidden = 4 * LENGTH * 32 * 4
    assert cut == whole // tp + 2 * (hidden - hidden // tp)


def sent_shapes(rank: int, world_size: int, layout: Layout) -> set[tuple[int, ...]]:
    shapes: set[tuple[int, ...]] = set()
    send = Transport.send

    def watched(self: Transport, message: Action, tensors: Sequence[torch.Tensor], with_header: bool = False) -> None:
        shapes.update(tuple(tensor.shape) for tensor in tensors)
        send(self, message, tensors, with_header)

    Transport.send = watched  # type: ignore[method-assign]
    train_rank(models.gpt, layout, rank)
    return shapes


def test_the_pipeline_sends_parts() -> None:
    layout = parse_layout("tp2_sp_pp2").resolve(4)
    tokens = LENGTH - 1  # 15: the parts have 8, padding included
    assert run_ranks(sent_shapes, 4, layout) == [{(2, -(-tokens // 2), 32)}] * 4


class Doubling(nn.Module):
    """A block that makes the sequence shorter."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.down(self.up(x).relu()))[:, :-1]


def test_what_cannot_be_cut() -> None:
    with pytest.raises(ModelError, match=r"parallel=tp2_sp: sp cuts the hidden state between the blocks of a chain, and Chain has"):
        plan_of(Chain(Block, depth=1), "tp2_sp")
    with pytest.raises(ModelError, match=r"keeps its shape, and the blocks of blocks pass on .*: use parallel=tp2$"):
        plan_of(Chain(Doubling), "tp2_sp")
    with pytest.raises(
        LayoutError, match=r"parallel=pp2_sp: sp cuts the sequence over the tensor-parallel ranks, and tp is 1: add tp2"
    ):
        parse_layout("pp2_sp")
    with pytest.raises(LayoutError, match=r"parallel=tp2_sp_sp: 'sp' is given twice"):
        parse_layout("tp2_sp_sp")


def run_positionwise(rank: int, world_size: int) -> None:
    """Parts, a replicated tensor and both mixed give what the whole module gives, and addends of its gradients."""
    axis = tp_axis()
    sequence = SequenceParallel(axis, 1)
    generator = torch.Generator().manual_seed(0)
    for is_parted in (True, False):
        whole, split = nn.LayerNorm(4), nn.LayerNorm(4)
        convert_positionwise(split, sequence)
        assert isinstance(split, nn.LayerNorm) and type(split).__name__ == "LayerNorm"
        x = torch.randn(2, 5, 4, generator=generator)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        upstream = torch.randn(2, 5, 4, generator=generator)
        whole(a).mul(upstream).sum().backward()
        output = split(sequence.enter(b * 1) if is_parted else b * 1)
        assert isinstance(output, ShardedTensor) == is_parted and output.shape == x.shape
        (output.full_tensor() if is_parted else output).mul(upstream).sum().backward()
        torch.testing.assert_close(b.grad, a.grad)
        total = split.weight.grad.clone()
        axis.all_reduce(total)
        torch.testing.assert_close(total, whole.weight.grad)
        with torch.no_grad():
            torch.testing.assert_close(split(x), whole(x))


def test_modules_on_parts() -> None:
    run_ranks(run_positionwise, 2)


def run_ends(rank: int, world_size: int) -> None:
    sequence = SequenceParallel(tp_axis(), 1)
    hidden = torch.arange(2 * 5 * 3.0).view(2, 5, 3).requires_grad_()
    cut = Split(1, (5,))
    part = cut.shard(hidden.detach(), 2, rank)
    assert sequence.like(hidden).shape == part.shape == (2, 3, 3)
    entered = sequence.enter(hidden)
    assert sequence.enter(entered) is entered and torch.equal(entered.local, part)
    assert torch.equal(sequence.leave(entered), part) and torch.equal(sequence.leave(hidden), part)
    assert torch.equal(sequence.arrive(part, hidden).full_tensor(), hidden)
    entered.full_tensor().square().sum().backward()
    assert torch.equal(hidden.grad, 2 * hidden.detach())  # padding left no trace


def test_the_ends_of_the_chain() -> None:
    run_ranks(run_ends, 2)
