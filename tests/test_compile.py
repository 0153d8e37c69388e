"""torch.compile of the blocks: the same training, few graphs, shared by equal blocks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401

from lightning_par import HybridParallelStrategy
from lightning_par.config.parallel import read_layout
from lightning_par.config.search_path import register
from lightning_par.errors import ConfigurationError, ModelError
from lightning_par.install import install
from lightning_par.plan import Plan
from lightning_par.runtime.axis import LocalAxis
from tests import models
from tests.parity import check_parity
from tests.planning import Block, Chain, plan_of

EAGER = "aot_eager"  # the compiler's front without code generation, which takes seconds for each graph
LOCAL: dict[str, Callable[[], pl.LightningModule]] = {"gpt": models.gpt, "llama": models.llama}
GLOBAL: dict[str, Callable[[], pl.LightningModule]] = {"gpt2": models.gpt2, "encoder": models.encoder}


def with_compiled_parts() -> pl.LightningModule:
    """A user's own torch.compile, of a submodule, of a block and of the head."""
    module: Any = models.gpt()
    module.network.blocks[0].mlp.compile(backend=EAGER)
    module.network.blocks[1].compile(backend=EAGER)
    module.network.head = torch.compile(module.network.head, backend=EAGER)
    return module


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    for name in ("pytorch_lightning", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ---------------------------------------------------------------------- parity


def test_the_same_training() -> None:
    check_parity({**LOCAL, **GLOBAL}, "tp2", compile=EAGER)


def test_the_same_training_with_recomputed_blocks() -> None:
    check_parity({"llama": models.llama, "gpt2": models.gpt2}, "tp2", compile=EAGER, recompute="full")


@pytest.mark.parametrize("word", ["tp2_pp2", "tp2_sp"])
def test_the_same_training_in_stages_and_on_parts(word: str) -> None:
    check_parity({"llama": models.llama}, word, compile=EAGER)


def test_what_the_user_has_compiled_stays_so() -> None:
    check_parity({"compiled": with_compiled_parts}, "tp2", compile=EAGER)


@pytest.mark.slow
@pytest.mark.parametrize(("word", "recompute"), [("tp2", "none"), ("tp2", "full"), ("tp2_pp2", "none"), ("tp2_sp", "none")])
def test_the_same_training_with_generated_code(word: str, recompute: str) -> None:
    check_parity({**LOCAL, **GLOBAL}, word, timeout=280, compile=True, recompute=recompute)


# ---------------------------------------------------------------------- graphs


def graphs(make: Callable[[], pl.LightningModule], word: str, recompute: str = "none") -> list[int]:
    """Operations of each graph that three steps of training compile, on one of the ranks."""
    torch.manual_seed(0)
    module, batch, sizes = make(), models.make_batch(0, 2), []
    plan = plan_of(module, word, batch, {"compile": EAGER, "recompute": {"*": recompute}})
    assert plan.compilation is not None

    def count(graph: Any, inputs: Any) -> Any:
        sizes.append(sum(node.op in ("call_function", "call_method") for node in graph.graph.nodes))
        return graph.forward

    counted = replace(plan, compilation=replace(plan.compilation, backend=count))  # type: ignore[arg-type]
    install(module, counted, 0, LocalAxis("tp", plan.layout.tp, 0), torch.device("cpu"))
    module.__dict__["log"] = lambda name, value: None
    for _ in range(3):
        module.training_step(batch, 0).backward()
    return sizes


def test_graphs_of_a_block() -> None:
    assert len(graphs(models.gpt, "single")) == 1  # all four blocks share it
    torch.compiler.reset()
    assert len(graphs(models.gpt, "tp2")) == 6  # between the six split layers
    torch.compiler.reset()
    assert len(graphs(models.gpt, "tp2", "full")) == 6
    torch.compiler.reset()
    depth, attention = 4, 1  # transformers' attention reads the number of its layer: one graph of a block has a version for each
    assert len(graphs(models.llama, "tp2")) == 8 + (depth - 1) * attention


def compiled(module: nn.Module, word: str) -> tuple[set[str], str]:
    """The modules that a plan compiles, of the first block, and its note."""
    plan = plan_of(module, word, models.make_batch(0, 2), {"compile": True})
    assert plan.compilation is not None and plan.chain is not None and Plan.from_dict(plan.to_dict()) == plan
    first = plan.chain.blocks[0]
    return {name.removeprefix(first) for name in plan.compilation.modules if name.startswith(first)}, plan.notes[-1]


def test_what_is_compiled() -> None:
    assert compiled(models.gpt(), "pp2") == ({""}, "torch.compile (inductor) compiles network.blocks.*")
    modules, note = compiled(models.llama(), "tp2")
    assert modules == {""} and note == (
        "torch.compile (inductor) compiles model.model.layers.*; layers that are split over tp run as written inside"
    )
    modules, note = compiled(models.gpt2(), "tp2")  # its attention has activations of global shape
    assert modules == {".mlp"} and note == (
        "torch.compile (inductor) compiles model.transformer.h.*.mlp; the rest of the blocks runs as written, because activations "
        "have their global shape there"
    )
    assert compiled(models.llama(), "tp2_sp")[0] == {".input_layernorm", ".post_attention_layernorm"}
    modules, note = compiled(models.encoder(), "tp2")
    assert modules == set() and note.startswith("torch.compile (inductor) compiles nothing; ")


def test_a_copy_has_weights_of_its_own() -> None:
    module: Any = models.llama()
    batch = models.make_batch(0, 2)
    plan = plan_of(module, "tp2_sp", batch, {"compile": EAGER})
    install(module, plan, 0, LocalAxis("tp", 2, 0), torch.device("cpu"))
    module.__dict__["log"] = lambda name, value: None
    before = module.training_step(batch, 0)
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not twin.model(batch["tokens"]).logits.local.any() and torch.equal(module.training_step(batch, 0), before)


# ---------------------------------------------------------------------- what cannot be


def test_backends() -> None:
    with pytest.raises(ConfigurationError, match=r"compile=inducter: torch.compile has no such backend here: use .* or inductor$"):
        HybridParallelStrategy("tp2", compile="inducter")
    with pytest.raises(ConfigurationError, match=r"compile=nothing_like_it: .*: use compile=true for inductor, or .*inductor"):
        plan_of(models.gpt(), "tp2", models.make_batch(0, 2), {"compile": "nothing_like_it"})
    assert HybridParallelStrategy("tp2", compile=True).options.overrides == {"compile": "inductor"}
    assert HybridParallelStrategy("tp2", compile=EAGER).options.overrides == {"compile": EAGER}
    assert HybridParallelStrategy("tp2").options.overrides == {}


def test_what_does_not_go_together() -> None:
    batch = models.make_batch(0, 2)
    with pytest.raises(ConfigurationError, match=r"compile with recompute=selective: .*: use recompute=full, or recompute=none"):
        plan_of(models.gpt(), "tp2", batch, {"compile": True, "recompute": {"network.blocks.2": "selective"}})
    with pytest.raises(ConfigurationError, match=r"parallel=dp2_zero3_mb1: compile with zero3: .*: use zero2 or compile=false"):
        plan_of(models.gpt(), "dp2_zero3", batch, {"compile": True})
    with pytest.raises(ModelError, match=r"compile works block by block, and Chain has no chain of blocks .* or use compile=false"):
        plan_of(Chain(Block, depth=1), "tp2", overrides={"compile": True})


def test_hydra() -> None:
    register()
    conf = Path(__file__).resolve().parents[1] / "conf"
    for typed, value in (("true", True), (EAGER, EAGER), ("false", False)):
        with initialize_config_dir(str(conf), version_base="1.3"):
            config = compose("train", overrides=["parallel=tp2", f"parallel.compile={typed}"])
        assert config.parallel.compile == value and read_layout(config.parallel).tp == 2
