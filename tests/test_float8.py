"""Float8 on a CPU, where torchao emulates the products: against torchao's own linear layer, and over ranks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from transformers.pytorch_utils import Conv1D

from lightning_par import HybridParallelStrategy
from lightning_par.engine import Engine
from lightning_par.errors import ConfigurationError, ModelError, PlanError
from lightning_par.layout import parse_layout
from lightning_par.plan import Plan
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.parameter import get_spec
from lightning_par.tensor import Float8Arithmetic, check_float8, multiply_in_float8
from tests.planning import Block, Chain, Unordered, plan_of, quiet_trainer, tokens
from tests.ranks import run_ranks

RECIPES = ("tensorwise", "rowwise")
Gradients = dict[str, torch.Tensor]


def torchao_config(recipe: str) -> Float8LinearConfig:
    chosen: Any = Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(chosen, "emulate", True)  # it has no recipe for that
    return chosen


def passed(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(32, 16), (3, 5, 16)])  # 15 rows are no multiple of 16
def test_a_layer_computes_what_torchaos_own_does(recipe: str, dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    mine, theirs = (nn.Sequential(nn.Linear(16, 48, bias, dtype=dtype)) for _ in range(2))
    theirs.load_state_dict(mine.state_dict())
    rows, columns = torch.logspace(-4, 4, shape[-2]), torch.logspace(-3, 3, shape[-1])  # else a scale along the wrong dim would do
    x = (torch.randn(shape) * rows[:, None] * columns).to(dtype)
    plain = passed(mine, x)
    mine.zero_grad()
    multiply_in_float8(mine, ["0"], Float8Arithmetic(recipe, emulate=True))
    convert_to_float8_training(theirs, config=torchao_config(recipe))
    for ours, wanted, exact in zip(passed(mine, x), passed(theirs, x), plain, strict=True):
        assert torch.equal(ours, wanted)
        assert ours.dtype == dtype and ours.shape == exact.shape
    assert not torch.equal(passed(mine, x)[0], plain[0])  # it is not the plain product
    assert f"float8 {recipe}" in repr(mine)


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_that_are_compiled_are_the_same(recipe: str) -> None:
    graphs = list[Any]()

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    written, compiled = Float8Arithmetic(recipe, emulate=True), Float8Arithmetic(recipe, emulate=True, backend=keep)  # type: ignore[arg-type]
    x, y, weight, bias = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((3, 5, 16), (3, 5, 48), (48, 16), (48,)))
    for transposed in (False, True):
        for ours, wanted in zip(
            *(_products(arithmetic, x, y, weight, bias, transposed) for arithmetic in (compiled, written)), strict=True
        ):
            assert torch.equal(ours, wanted)
    assert len(graphs) == 4  # whole products: that of a weight's gradient has one for each way the weight lies


def _products(arithmetic: Float8Arithmetic, x: Any, y: Any, weight: Any, bias: Any, transposed: bool) -> list[torch.Tensor]:
    rows = x.flatten(0, 1), y.flatten(0, 1)
    return [
        arithmetic.output(x, weight, bias),
        arithmetic.input_gradient(y, weight),
        arithmetic.weight_gradient(*rows, transposed),
    ]


class Feedforward(nn.Module):
    """Its weights lie in either way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), Conv1D(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


@pytest.mark.parametrize("recipe", RECIPES)
def test_in_a_compiled_block_a_whole_layer_is_part_of_the_graph(recipe: str) -> None:
    num_graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    found = []
    for compiles in (False, True):
        torch.manual_seed(0)
        blocks = nn.ModuleList(Feedforward() for _ in range(10)).bfloat16()
        names = [f"{index}.{layer}" for index in range(10) for layer in ("up", "down")]
        multiply_in_float8(blocks, names, Float8Arithmetic(recipe, emulate=True))
        x = torch.randn(3, 5, 16, dtype=torch.bfloat16, requires_grad=True)
        y = x * 1  # as between blocks, where it is no leaf
        for block in blocks:
            if compiles:
                block.compile(backend=count, fullgraph=True)
            y = block(y)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(parameter.grad for parameter in blocks.parameters())])
    assert num_graphs == 1  # of all ten
    for ours, wanted in zip(*found, strict=True):
        assert torch.equal(ours, wanted)


def test_a_transposed_weight_a_frozen_one_and_no_gradients() -> None:
    torch.manual_seed(0)
    conv, linear, x = Conv1D(32, 16), nn.Linear(16, 32), torch.randn(4, 16)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    for layer in (conv, linear):
        multiply_in_float8(nn.Sequential(layer), ["0"], Float8Arithmetic("rowwise", emulate=True))
    (y, dx, dw, db), (y_, dx_, dw_, db_) = passed(conv, x), passed(linear, x)
    assert torch.equal(y, y_) and torch.equal(dx, dx_) and torch.equal(dw, dw_.t()) and torch.equal(db, db_)
    linear.weight.requires_grad_(False)
    linear.zero_grad()
    assert torch.equal(passed(linear, x)[1], dx) and linear.weight.grad is None and torch.equal(linear.bias.grad, db)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(linear(x), y)


# ---------------------------------------------------------------------- layouts


class Narrow(Block):
    """Its second layer does not have the sides that float8 takes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.gate = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu()) * self.gate(x).sigmoid()


def build() -> Chain:
    torch.manual_seed(0)
    return Chain(Block)


def alone(recipe: str | None, microbatches: int) -> Gradients:
    """Mean gradients of one process, whose microbatches are scaled apart as in a pipeline."""
    module = build()
    if recipe is not None:
        convert_to_float8_training(module.blocks, config=torchao_config(recipe))
    for piece in tokens(8)["tokens"].chunk(microbatches):
        (module.training_step({"tokens": piece}, 0) / microbatches).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def trained(rank: int, world_size: int, word: str, schedule: str, recipe: str) -> dict[str, tuple[float, ...]]:
    """How far each gradient that this rank holds is from that of one process in float8, and of one without, relative to it."""
    module, layout = build(), parse_layout(word).resolve(world_size)
    plan = plan_of(module, word, tokens(8), {"fp8": recipe})
    engine = Engine(module, plan, Mesh(layout, timedelta(seconds=30)), torch.device("cpu"), schedule)
    engine.own_states([torch.optim.SGD(module.parameters(), lr=0.1)])
    microbatches = layout.microbatches or 1
    pieces = tokens(8)["tokens"].chunk(microbatches)
    engine.train(
        lambda index: module.training_step({"tokens": pieces[index]}, 0), [1 / microbatches] * microbatches, lambda loss: loss
    )
    truth, plain = alone(recipe, microbatches), alone(None, microbatches)
    compared = {}
    for parameter in module.parameters():
        spec = get_spec(parameter)
        if parameter.grad is not None and engine.mesh.coordinate.pp in spec.stages:
            parts = [truth[spec.name], plain[spec.name]]
            if spec.split is not None and layout.tp > 1:
                parts = [spec.split.shard(part, layout.tp, engine.mesh.coordinate.tp) for part in parts]
            compared[spec.name] = tuple(float((parameter.grad - part).norm() / part.norm()) for part in parts)
    return compared


def all_layouts(rank: int, world_size: int) -> dict[tuple[str, str, str], Any]:
    cases = [("pp2_mb4", "1f1b"), ("pp2_mb4", "zb-h1"), ("tp2", "1f1b")]
    return {
        (word, schedule, recipe): trained(rank, world_size, word, schedule, recipe)
        for word, schedule in cases
        for recipe in RECIPES
    }


def test_pipelines_equal_one_process_and_tensor_parts_differ_by_their_own_scales_only() -> None:
    for found in run_ranks(all_layouts, 2):
        for (word, schedule, recipe), compared in found.items():
            assert compared, (word, schedule)
            for name, (to_float8, to_plain) in compared.items():
                where = f"{word} {schedule} {recipe} {name}: {to_float8}, {to_plain}"
                assert to_plain > 1e-4, where  # float8 rounds: the layers did multiply in it
                # over tp a part of a tensor has a scale of its own. Row-wise scales are powers of two, so that nothing rounds in
                # another way; else two errors of one size, independent of each other, are sqrt(2) times that size apart
                is_same = word.startswith("pp") or recipe == "rowwise"
                assert to_float8 < (1e-6 if is_same else 1.5 * to_plain), where


# ---------------------------------------------------------------------- plan and errors


def test_the_plan_says_which_layers() -> None:
    plan = plan_of(build(), "tp2", overrides={"fp8": "rowwise"})
    assert plan.float8 is not None and plan.float8.recipe == "rowwise"
    assert plan.float8.layers == ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")
    assert "float8 (rowwise) in 4 linear layers of the blocks" in plan.notes
    assert Plan.from_dict(plan.to_dict()) == plan
    narrow = plan_of(Chain(Narrow), "single", overrides={"fp8": "tensorwise"})
    assert narrow.float8 is not None and narrow.float8.layers == ("blocks.0.gate", "blocks.1.gate")
    assert any(
        note.endswith("; not blocks.*.down, blocks.*.up, whose sides are no multiples of 16 on each rank") for note in narrow.notes
    )


def test_what_cannot_be() -> None:
    with pytest.raises(
        ConfigurationError, match=r"fp8=rowwise: no linear layer in the blocks of Chain has a weight, on each of tp=4"
    ):
        plan_of(build(), "tp4", overrides={"fp8": "rowwise"})
    with pytest.raises(
        ModelError, match=r"fp8=rowwise is for the linear layers of the blocks, and Unordered has no chain of blocks"
    ):
        plan_of(Unordered(Block), "single", overrides={"fp8": "rowwise"})
    with pytest.raises(ConfigurationError, match=r"fp8=rowwise with recompute=selective: that keeps the results of torch's own"):
        plan_of(build(), "tp2", overrides={"fp8": "rowwise", "recompute": {"*": "selective"}})
    with pytest.raises(PlanError, match="fp8=e4m3: use one of tensorwise, rowwise"):
        HybridParallelStrategy("tp2", fp8="e4m3")
    with pytest.raises(PlanError, match="fp8=delayed: use one of tensorwise, rowwise"):
        plan_of(build(), "tp2", overrides={"fp8": "delayed"})


def test_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    with pytest.raises(
        ConfigurationError, match="fp8=rowwise needs the float8 units of an NVIDIA GPU, and this run is on cpu: leave"
    ):
        check_float8("rowwise", cpu, "bf16-mixed")
    with pytest.raises(
        ConfigurationError, match="fp8=rowwise with precision=32-true: float8 products give bfloat16: use precision="
    ):
        check_float8("rowwise", gpu, "32-true")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigurationError, match=r"capability 9.0 or higher \(Hopper, Blackwell\), and NVIDIA A100 has 8.0"):
        check_float8("tensorwise", gpu, "bf16-true")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_float8("tensorwise", gpu, "bf16-true")
    monkeypatch.setattr("lightning_par.tensor.float8.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="fp8=rowwise scales by torchao, which is not installed: pip install torchao"):
        check_float8("rowwise", cpu, "bf16-mixed")


def test_a_trainer_says_so_before_it_starts_anything() -> None:
    trainer = quiet_trainer("tp2", 2, {"fp8": "rowwise"})
    with pytest.raises(ConfigurationError, match="fp8=rowwise"):
        trainer.fit(build(), torch.utils.data.DataLoader([tokens(1)]))
