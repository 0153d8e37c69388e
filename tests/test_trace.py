"""The dry run: what it sees of a step, and that it leaves no mark."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from lightning_par.trace import Trace, trace_step
from lightning_par.trace.chain import find_chain
from tests.models import gpt2, make_batch
from tests.planning import Block, Chain, tokens

WIDTH = 16


def trace(module: nn.Module, batch: Any = None, **options: Any) -> Trace:
    return trace_step(module, tokens() if batch is None else batch, batch_size=4, **options)


# ---------------------------------------------------------------------- what it sees


def test_blocks_and_phases() -> None:
    seen = trace(Chain(Block, depth=3))
    assert seen.chains == ("blocks",) and [block.path for block in seen.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    phases = {op.layer: op.phase for op in seen.ops if op.layer}
    assert phases["embedding"] == 0 and phases["head"] == 6
    assert [phases[f"blocks.{index}.up"] for index in range(3)] == [1, 3, 5]
    assert [seen.block_of(phase) for phase in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    for before, after in zip(seen.blocks, seen.blocks[1:], strict=False):
        assert before.carry_out == after.carry_in


class Passing(Chain):
    """Blocks called in one of several ways."""

    def __init__(self, call: Callable[[nn.Module, torch.Tensor], Any], make: Callable[[], nn.Module]) -> None:
        super().__init__(make)
        self.call = call

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = self.call(block, x)
        logits: torch.Tensor = self.head(x)
        return logits


def block_that(give: Callable[[torch.Tensor], Any]) -> Callable[[], nn.Module]:
    class Giving(Block):
        def forward(self, x: torch.Tensor, condition: Any = None) -> Any:  # type: ignore[override]
            return give(super().forward(x))

    return Giving


class Conditioned(Block):
    """The condition comes first and depends on parameters, too."""

    def forward(self, condition: torch.Tensor, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * condition


class SideFirst(Passing):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        condition = x.mean(1, keepdim=True)
        for block in self.blocks:
            x = block(condition, x)
        logits: torch.Tensor = self.head(x)
        return logits


@pytest.mark.parametrize(
    ("module", "argument", "output", "template"),
    [
        (lambda: Passing(lambda block, x: block(x), Block), 0, (), None),
        (lambda: Passing(lambda block, x: block(x=x), Block), "x", (), None),
        (lambda: Passing(lambda block, x: block(x)[0], block_that(lambda x: (x, None))), 0, (0,), ("tuple", (0, 1), (None, None))),
        (lambda: Passing(lambda block, x: block(x)[1], block_that(lambda x: [3, x])), 0, (1,), ("list", (0, 1), (3, None))),
        (
            lambda: Passing(lambda b, x: b(x)["h"], block_that(lambda x: {"w": None, "h": x})),
            0,
            ("h",),
            ("dict", ("w", "h"), (None, None)),
        ),
        (lambda: Passing(lambda block, x: block(condition=torch.ones(1), x=x), block_that(lambda x: x)), "x", (), None),
        (lambda: SideFirst(lambda block, x: None, Conditioned), 1, (), None),
    ],
    ids=["position", "keyword", "tuple", "list", "dict", "beside a neutral tensor", "behind a condition"],
)
def test_where_the_hidden_state_passes(module: Callable[[], nn.Module], argument: Any, output: Any, template: Any) -> None:
    for block in trace(module()).blocks:
        assert (block.carry_argument, block.carry_output, block.template) == (argument, output, template)


def test_ties() -> None:
    seen = trace(gpt2(), make_batch(0, 4))
    tied = seen.parameters["model.transformer.wte.weight"]
    assert tied.aliases == ("model.transformer.wte.weight", "model.lm_head.weight")
    assert seen.canonical("model.lm_head.weight") == tied.name
    assert {op.parameters for op in seen.ops if op.layer == "model.lm_head"} == {("model.lm_head.weight",)}


def test_flops_and_saved_bytes() -> None:
    seen = trace(Chain(Block, depth=2))
    positions = 4 * 6
    block = 2 * positions * WIDTH * 32 * 2  # two products, a multiplication and an addition each
    assert seen.flops == (0, block, 0, block, 2 * positions * WIDTH * 24)
    # the input of both layers; relu saves its result, which is the second one's input
    assert seen.saved_bytes[1] == 4 * positions * (WIDTH + 32)
    assert seen.saved_bytes[3] == 4 * positions * (WIDTH + 32)


def test_tensors_of_the_batch_are_known() -> None:
    seen = trace(Chain(Block))
    (lookup,) = (op for op in seen.ops if op.layer == "embedding")
    assert seen.values[lookup.inputs[0]].is_batch
    assert not any(seen.values[number].depends_on_parameters for number in lookup.inputs)
    assert all(seen.values[number].depends_on_parameters for number in lookup.outputs)


@dataclass
class Samples:
    tokens: torch.Tensor
    names: list[str]


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: {"a": {"b": x}}, lambda batch: batch["a"]["b"]),
        (lambda x: Samples(x, ["n"]), lambda batch: batch.tokens),
        (lambda x: BatchEncoding({"input_ids": x}), lambda batch: batch.input_ids),
        (lambda x: BaseModelOutput(last_hidden_state=x), lambda batch: batch.last_hidden_state),
        (lambda x: [x, "text"], lambda batch: batch[0]),
    ],
    ids=["dict", "dataclass", "BatchEncoding", "ModelOutput", "list"],
)
def test_batches_of_every_kind(wrap: Callable[[Any], Any], unwrap: Callable[[Any], Any]) -> None:
    class Wrapped(Chain):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self(unwrap(batch)).mean()

    assert len(trace(Wrapped(Block), wrap(tokens()["tokens"])).blocks) == 2


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return 2 * grad


def test_what_a_custom_function_makes_depends_on_parameters() -> None:
    seen = trace(Passing(lambda block, x: Doubled.apply(block(x)), Block))
    assert len(seen.blocks) == 2 and seen.values[seen.blocks[1].carry_in].depends_on_parameters


def test_layers_with_parameters_of_their_own_are_no_layers() -> None:
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, WIDTH)
            self.scale = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    for make in (Adapted, lambda: normed):
        seen = trace(Passing(lambda block, x: block(x), lambda make=make: nn.Sequential(make(), nn.ReLU())))
        assert set(seen.layers) == {"embedding", "head"}


# ---------------------------------------------------------------------- values


class Step(Chain):
    """Another training step over the same chain."""

    def __init__(self, step: Callable[[Any, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]) -> None:
        super().__init__(Block)
        self.step = step
        self.counter = 0
        self.history: list[Any] = []
        self.register_buffer("running", torch.zeros(()))
        self.accuracy = MulticlassAccuracy(24)
        self.metrics = MetricCollection({"accuracy": MulticlassAccuracy(24), "mean": MeanMetric()})

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.step(self, self(batch["tokens"]), batch)


def logs_an_item(module: Any, logits: torch.Tensor, batch: Any) -> torch.Tensor:
    loss = logits.mean()
    module.log("loss", loss.item(), prog_bar=True)
    module.print(f"{float(loss)} {int(batch['tokens'].sum())}")
    return loss


def branches(module: Any, logits: torch.Tensor, batch: Any) -> torch.Tensor:
    if batch["tokens"].sum() and not logits.isnan().any():
        return logits.mean()
    return logits.sum()


@pytest.mark.parametrize("step", [logs_an_item, branches])
def test_values_are_assumed(step: Any) -> None:
    seen = trace(Step(step))
    assert seen.notes and all("reads a value of a tensor" in note for note in seen.notes)
    assert seen.flops[1] > 0


def masks(module: Any, logits: torch.Tensor, batch: Any) -> torch.Tensor:
    kept = logits[batch["tokens"] > 3]
    module.running += 1
    with torch.no_grad():
        module.head.weight.mul_(2)  # such as a moving average of weights
    return kept.mean()


def test_shapes_that_depend_on_values_need_real_tensors() -> None:
    module = Step(masks)
    weight = module.head.weight.clone()
    seen = trace(module)
    (kept,) = (op for op in seen.ops if op.name == "__getitem__" and "<tensor>" in op.arguments)
    assert seen.values[kept.outputs[0]].shape == (int((tokens()["tokens"] > 3).sum()), 24)
    assert module.running == 0 and torch.equal(module.head.weight, weight)  # copies


def counts(module: Any, logits: torch.Tensor, batch: Any) -> torch.Tensor:
    module.accuracy(logits.flatten(0, 1), batch["tokens"].flatten())
    module.metrics.update(logits.flatten(0, 1), batch["tokens"].flatten())
    module.log("accuracy", module.accuracy)
    module.counter += 1
    module.history.append(logits)
    module.running += 1
    return F.dropout(logits, 0.1).mean() + random.random() + float(np.random.rand()) + torch.rand(())


# ---------------------------------------------------------------------- no side effect


def test_nothing_changes() -> None:
    module = Step(counts)
    trainer = object()
    module.__dict__["_trainer"] = trainer
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    names = [(name, id(p)) for name, p in module.named_parameters()]
    seen = trace(module)
    assert len(seen.blocks) == 2
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
    assert (np.random.get_state()[1] == before[1]).all()
    assert (module.counter, module.history, module.running.item()) == (0, [], 0)
    assert module.accuracy.update_count == 0 and not any(metric.update_called for metric in module.metrics.values())
    assert [(name, id(p)) for name, p in module.named_parameters()] == names
    assert module.__dict__["_trainer"] is trainer
    assert all(p.grad is None and not p._backward_hooks for p in module.parameters())
    assert not module._forward_hooks and "log" not in module.__dict__ and module.training


def test_attributes_that_cannot_be_copied_are_shared(tmp_path: Path) -> None:
    class Holding(Chain):
        def __init__(self) -> None:
            super().__init__(Block)
            self.lock, self.file = threading.Lock(), (tmp_path / "log").open("w")
            self.helper = {"module": self, "lock": self.lock}

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            with self.lock:
                return self(batch["tokens"]).mean()

    module = Holding()
    assert len(trace(module).blocks) == 2
    module.file.close()


def test_errors_are_the_users_own() -> None:
    def fails(module: Any, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        raise KeyError("typo")

    with pytest.raises(KeyError, match="typo"):
        trace(Step(fails))
    seen = trace(Step(fails), keep_error=True)
    assert isinstance(seen.error, KeyError) and any(op.layer == "head" for op in seen.ops)


# ---------------------------------------------------------------------- the chain


class Holder(pl.LightningModule):
    """One child, and a step that runs its blocks."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child


def blocks(count: int = 3) -> list[Block]:
    return [Block() for _ in range(count)]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(blocks(2))


@pytest.mark.parametrize(
    ("child", "path"),
    [
        (lambda: nn.Sequential(*blocks()), "child"),
        (lambda: nn.ModuleList(blocks()), "child"),
        (lambda: nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList(blocks())})}), "child.encoder.layers"),
        (lambda: nn.ModuleList([nn.Linear(200, 200), nn.ModuleList(blocks())]), "child.1"),
        (lambda: nn.ModuleList([Nested(), Nested()]), "child"),
        (lambda: nn.Sequential(OrderedDict(first=Block(), second=Block())), "child"),
        (lambda: nn.ModuleDict({"small": nn.ModuleList(blocks(2)), "large": nn.ModuleList(blocks(3))}), "child.large"),
        (lambda: nn.ModuleList([Block()] * 3), None),
        (lambda: nn.Linear(2, 2), None),
    ],
    ids=[
        "Sequential",
        "ModuleList",
        "nested",
        "beside a larger mixed one",
        "lists in blocks",
        "named",
        "two",
        "one shared",
        "none",
    ],
)
def test_the_largest_container_of_one_class(child: Callable[[], nn.Module], path: str | None) -> None:
    found, seen = find_chain(Holder(child()))
    assert found == path
    assert all(reason for _, reason in seen)


def test_named_blocks_and_lists_inside_blocks() -> None:
    class Named(Chain):
        def __init__(self) -> None:
            super().__init__(Block)
            self.blocks = nn.Sequential(OrderedDict(first=Block(), second=Block()))  # type: ignore[assignment]

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.blocks(self.embedding(tokens)))
            return logits

    assert [block.path for block in trace(Named()).blocks] == ["blocks.first", "blocks.second"]

    class Inner(Nested):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for expert in self.experts:
                x = expert(x)
            return x

    seen = trace(Chain(Inner))
    assert seen.chains == ("blocks",) and len(seen.blocks) == 2


class Parallel(Chain):
    """Blocks beside each other."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        logits: torch.Tensor = self.head(sum(block(x) for block in self.blocks))
        return logits


class Twice(Chain):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self(batch["tokens"]) - self(batch["tokens"].flip(1))).square().mean()


class Early(Passing):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[0](self.embedding(tokens)))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: Parallel(Block), "blocks.1 does not take the output of the block before"),
        (lambda: Twice(Block), "its blocks do not run once each, in order (blocks.0 ran after blocks.1)"),
        (lambda: Early(lambda block, x: None, Block), "the step runs 1 of its 2 blocks"),
    ],
    ids=["beside each other", "twice", "not all"],
)
def test_blocks_that_are_no_chain(module: Callable[[], nn.Module], reason: str) -> None:
    seen = trace(module())
    assert seen.chains == () and seen.blocks == () and seen.chains_seen == (("blocks", reason),)
    assert all(seen.is_inside_block(op) for op in seen.ops)
