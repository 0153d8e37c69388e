"""The plan as a tree of modules: what is on which line, and that it adds up to the plan."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_par.plan import Plan, render_plan
from lightning_par.plan.tree import ModuleNode, module_tree
from tests.models import gpt2, llama, make_batch
from tests.planning import Block, Chain, plan_of, tokens


class MiddleDiffers(Chain):
    def __init__(self) -> None:
        super().__init__(Block, depth=5)
        self.blocks[2].up = nn.Linear(16, 32, bias=False)


class Attending(Block):
    """Computes without a parameter: in the block itself, and in a module that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.product = Product()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.bmm(x @ x.transpose(1, 2), x)  # two products of 2 x 4 x 6 x 6 x 16 operations
        return super().forward(x + self.product(x))


class Product(nn.Module):
    """One product of as many."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ x.transpose(1, 2)).mean(-1, keepdim=True)


class Plain(pl.LightningModule):
    """No chain of blocks; a parameter of its own, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.first = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.again = self.first

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = (self.again(self.first(batch)) * self.scale).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def walk(node: ModuleNode, above: str = "") -> Iterator[tuple[str, ModuleNode]]:
    """Every node with its path as drawn."""
    for child in node.children:
        path = f"{above}.{child.name}".removeprefix(".")
        yield path, child
        yield from walk(child, path)


def nodes(plan: Plan) -> dict[str, ModuleNode]:
    return dict(walk(module_tree(plan)))


PLANS = {
    "tp1": lambda: plan_of(Chain(Block), "single"),
    "pipeline": lambda: plan_of(Chain(Block, depth=4), "tp2_pp2"),
    "virtual stages": lambda: plan_of(Chain(Block, depth=4), "tp2_pp2_vp2"),
    "middle": lambda: plan_of(MiddleDiffers(), "tp2_pp2"),
    "attending": lambda: plan_of(Chain(Attending), "tp2"),
    "no chain": lambda: plan_of(Plain(), "dp2", torch.ones(4, 16)),
    "tied and fused": lambda: plan_of(gpt2(), "tp2_pp2", make_batch(0, 4)),
    "sequence": lambda: plan_of(llama(), "tp2_sp", make_batch(0, 4)),
}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {name: make() for name, make in PLANS.items()}


@pytest.mark.parametrize("name", PLANS)
def test_the_tree_adds_up_to_the_plan(name: str, plans: dict[str, Plan]) -> None:
    plan, tree = plans[name], module_tree(plans[name])
    assert tree.num_elements == sum(parameter.local_numel(1) for parameter in plan.parameters)
    assert tree.flops == sum(stage.flops for stage in plan.stages) == sum(plan.module_flops.values()) > 0
    assert len(tree.bytes_by_pp) == plan.layout.pp
    for pp, num_bytes in enumerate(tree.bytes_by_pp):
        assert num_bytes == sum(plan.stages[stage].parameter_bytes for stage in plan.layout.stages_of(pp))
    is_tied = any(len(parameter.aliases) > 1 for parameter in plan.parameters)
    for _, node in [("", tree), *walk(tree)]:
        inside = [p for p in plan.parameters if any(_is_in(alias, node.paths) for alias, _ in p.aliases)]
        own = [p for p in plan.parameters if p.spec.name.rpartition(".")[0] in node.paths]
        assert node.num_elements == sum(p.local_numel(1) for p in inside)
        if not is_tied:
            assert node.num_elements == sum(p.local_numel(1) for p in own) + sum(child.num_elements for child in node.children)
        assert node.flops == sum(flops for path, flops in plan.module_flops.items() if _is_in(path, node.paths))


def _is_in(name: str, paths: tuple[str, ...]) -> bool:
    """Whether a module or a parameter is below one of these modules, or one of them."""
    return any(f"{name}.".startswith(f"{path}." if path else "") for path in paths)


def test_equal_blocks_are_one_line_on_any_stages(plans: dict[str, Plan]) -> None:
    for name in ("pipeline", "virtual stages"):
        found = nodes(plans[name])
        assert list(found) == ["embedding", "blocks.[0-3]", "blocks.[0-3].up", "blocks.[0-3].down", "head"]
        blocks, up = found["blocks.[0-3]"], found["blocks.[0-3].up"]
        assert blocks.paths == ("blocks.0", "blocks.1", "blocks.2", "blocks.3") and blocks.stages == (0, 1)
        assert up.paths == ("blocks.0.up", "blocks.1.up", "blocks.2.up", "blocks.3.up")
        assert up.num_elements == 4 * (16 * 32 + 32) and up.bytes_by_pp == (2 * 4 * 16 * 17, 2 * 4 * 16 * 17)
        assert up.flops == 4 * 2 * 24 * 16 * 32  # two operations for each of 24 positions
        assert (found["embedding"].stages, found["head"].stages) == ((0,), (1,))
        assert found["head"].bytes_by_pp == (0, 4 * 12 * 16)


def test_a_block_that_differs_stands_alone(plans: dict[str, Plan]) -> None:
    found = nodes(plans["middle"])
    assert [path for path in found if path.count(".") <= 1 and path.startswith("blocks")] == [
        "blocks",
        "blocks.[0-1]",
        "blocks.2",
        "blocks.[3-4]",
    ]
    assert found["blocks.2"].num_elements == found["blocks.[0-1]"].num_elements // 2 - 32
    assert (found["blocks.[0-1]"].stages, found["blocks.[3-4]"].stages, found["blocks"].stages) == ((0,), (1,), (0, 1))


def test_what_has_no_parameters_computes_on_the_line_around_it(plans: dict[str, Plan]) -> None:
    plan = plans["attending"]
    product, layer = 2 * 4 * 6 * 6 * 16, 2 * 24 * 16 * 32
    assert plan.module_flops["blocks.1"] == 2 * product and plan.module_flops["blocks.1.product"] == product
    found = nodes(plan)
    assert "blocks.[0-1].product" not in found
    assert found["blocks.[0-1]"].flops == 2 * (3 * product + 2 * layer)
    assert found["blocks.[0-1].down"].flops == 2 * layer


def test_a_module_under_two_names_counts_once(plans: dict[str, Plan]) -> None:
    tree, found = module_tree(plans["no chain"]), nodes(plans["no chain"])
    assert list(found) == ["first", "first.0", "first.2", "again", "again.0", "again.2"]  # 0 and 2 are no neighbours
    assert tree.weight == "whole: one number" and tree.num_elements == 2 * 17 * 16 + 1
    assert found["again"].num_elements == found["first"].num_elements == 2 * 17 * 16
    assert found["again.2"].weight == "tied to first.2" and found["first.2"].weight == "whole: 16 x 16"
    assert found["first"].flops == tree.flops == 2 * 2 * 2 * 4 * 16 * 16 and found["again"].flops == 0


def test_ties_and_fused_weights(plans: dict[str, Plan]) -> None:
    found = nodes(plans["tied and fused"])
    head, embedding = found["model.lm_head"], found["model.transformer.wte"]
    assert embedding.weight == "vocabulary: 128/2 x 32" and head.weight == "tied to model.transformer.wte"
    assert (embedding.stages, head.stages) == ((0,), (1,))
    assert embedding.bytes_by_pp == head.bytes_by_pp[::-1] == (4 * 64 * 32, 0)
    assert found["model.transformer.h.[0-3].attn.c_attn"].weight == "column: 32 x (32+32+32)/2"
    assert found["model.transformer.h.[0-3].attn.c_proj"].weight == "row: 32/2 x 32; bias whole: 32"
    assert found["model.transformer.wpe"].weight == "whole: 64 x 32 (not the vocabulary)"


def test_activations(plans: dict[str, Plan]) -> None:
    found = nodes(plans["sequence"])
    block = found["model.model.layers.[0-3]"]
    activations = {child.name: child.activation for _, child in walk(block) if not child.children}
    assert activations == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "local"),
        **dict.fromkeys(("o_proj", "down_proj"), ""),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), "sequence/2"),
    }
    assert found["model.model.norm"].weight == "whole: 32, gradient summed"


def test_how_the_tree_is_drawn(plans: dict[str, Plan]) -> None:
    text = render_plan(plans["middle"])
    lines = [[cell.strip(" ") for cell in line.split("│", 1)[1].rsplit("│", 7)] for line in text.splitlines() if "─ " in line]
    assert [line[0] for line in lines] == [
        "├─ embedding",
        "├─ blocks",
        "│  ├─ [0-1]",
        "│  │  ├─ up",
        "│  │  └─ down",
        "│  ├─ 2",
        "│  │  ├─ up",
        "│  │  └─ down",
        "│  └─ [3-4]",
        "│     ├─ up",
        "│     └─ down",
        "└─ head",
    ]
    assert lines[3][1:7] == ["column: 32/2 x 16", "local", "0", "1,088", "2.1 KiB", "4.92e-05"]
    assert lines[0][6] == "", "a lookup is no operation"
    (root,) = (line for line in text.splitlines() if line.startswith("│ MiddleDiffers "))
    assert "│ 0, 1   │      6,096 │  7.1 KiB │ 0.000264 │" in root
    assert "┃ pp " in render_plan(plans["virtual stages"]).partition("Modules")[2], "which of a rank's stages is not said"


def test_flops_of_a_module_that_runs_twice() -> None:
    class Twice(Chain):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(super().forward(tokens) @ self.head.weight)
            return logits

    plan = plan_of(Twice(Block), "single", tokens())
    product = 2 * 24 * 16 * 24
    assert plan.module_flops["head"] == 2 * product and plan.module_flops[""] == product
    assert module_tree(plan).flops == sum(stage.flops for stage in plan.stages)
