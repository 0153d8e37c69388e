"""Activations that wait on the host: the same numbers, copied once, and what is refused."""

from __future__ import annotations

import logging
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import pytest
import torch
import yaml
from torch import nn

from benchmarks.storage import make_optimizer
from lightning_par import HybridParallelStrategy
from lightning_par.errors import ModelError, PlanError
from lightning_par.host.memory import Foresight
from lightning_par.install import install
from lightning_par.layout import parse_layout
from lightning_par.offload import _HostCopy
from lightning_par.plan import Plan, render_plan
from lightning_par.runtime.axis import LocalAxis
from tests.models import EncoderClassifier, gpt, llama, make_batch
from tests.parity import check_parity, train_rank
from tests.planning import Block, Chain, Unordered, plan_of, tokens
from tests.ranks import run_ranks
from tests.test_recompute import check_equal, dropping_encoder

CPU, ALONE = torch.device("cpu"), LocalAxis("tp", 1, 0)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("pytorch_lightning", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


# ---------------------------------------------------------------------- the same numbers


def offloaded_and_kept(rank: int, world_size: int, words: tuple[str, ...]) -> None:
    for word in words:
        layout = parse_layout(word).resolve(world_size)
        for name, make in (("llama", llama), ("encoder", dropping_encoder)):
            kept = train_rank(make, layout, rank)
            check_equal(f"{name} in {word}", kept, train_rank(make, layout, rank, offload_activations=True))
            options: dict[str, Any] = {"recompute": "full", "plan": {"offload_activations": {"*.0": True}}}
            check_equal(f"{name} in {word}, full", kept, train_rank(make, layout, rank, **options))


def test_numbers_are_the_same_bit_for_bit() -> None:
    run_ranks(offloaded_and_kept, 2, ("tp2_sp", "pp2"))


def test_parity() -> None:
    check_parity({"gpt": gpt, "encoder": EncoderClassifier}, "tp2_pp2", offload_activations=True)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["pp2_vp2", "dp2_zero3", "tp2_dp2_zero2", "pp2_dp2_zero3"])
def test_parity_in_more_layouts(word: str) -> None:
    check_parity({"gpt": gpt, "llama": llama}, word, offload_activations=True)


@pytest.mark.slow
def test_parity_where_weight_gradients_are_left_for_later() -> None:
    check_parity({"gpt": gpt}, "pp2_vp2", schedule="interleaved-zb", offload_activations=True)


# ---------------------------------------------------------------------- what is copied


class Saving(Block):
    """Two layers read one tensor; a buffer and an expanded tensor are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(16, 16)
        self.register_buffer("scale", torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(1, 1, 16).expand_as(x)
        return x * self.scale * ones + self.down(self.up(x).relu()) + self.other(x)


def copies_of(module: nn.Module, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    original = _HostCopy.__init__

    def counted(self: _HostCopy, tensor: torch.Tensor, stream: Any) -> None:
        shapes.append(tuple(tensor.shape))
        original(self, tensor, stream)

    monkeypatch.setattr(_HostCopy, "__init__", counted)
    module.training_step(batch, 0).backward()  # type: ignore[operator]
    return shapes


def test_each_tensor_is_copied_once_and_weights_never(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Chain(Saving, depth=2)
    install(module, plan_of(module, "single", overrides={"offload_activations": {"blocks.1": True}}), 0, ALONE, CPU)
    shapes = copies_of(module, tokens(), monkeypatch)
    # the input, which both layers read; the result of relu, which relu and a layer save in two shapes
    assert sorted(shapes) == [(4 * 6 * 16,), (4 * 6 * 32,)]


def test_nothing_is_copied_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Chain(Saving, depth=2)
    install(module, plan_of(module, "single", overrides={"offload_activations": {"*": True}}), 0, ALONE, CPU)
    monkeypatch.setattr(_HostCopy, "__init__", None)
    with torch.no_grad():
        module.training_step(tokens(), 0)


def test_the_forecast_is_that_of_a_device_with_memory_of_its_own() -> None:
    module, batch = gpt(), make_batch(0, 8)
    memory = {}
    for name, lines in {
        "kept": {},
        "offloaded": {"offload_activations": {"*": True}},
        "full": {"recompute": {"*": "full"}},
        "both": {"recompute": {"*": "full"}, "offload_activations": {"*": True}},
    }.items():
        memory[name] = Foresight(module, batch, [make_optimizer(module)], "1f1b")(plan_of(module, "pp2", batch, lines))[0]
    assert memory["both"].activations < memory["full"].activations < memory["kept"].activations / 2
    assert memory["offloaded"].activations < memory["kept"].activations / 2


# ---------------------------------------------------------------------- the plan


def plan_with(**lines: Any) -> Plan:
    return plan_of(Chain(Block, depth=4), "pp2", overrides=lines)


def test_lines_of_the_plan() -> None:
    plan = plan_with(offload_activations={"*": True, "blocks.0": False})
    assert plan.chain is not None and plan.chain.offload_activations == (False, True, True, True)
    assert Plan.from_dict(yaml.safe_load(yaml.safe_dump(plan.to_dict()))) == plan
    assert "activations wait on the host: blocks.[1-3]" in render_plan(plan)
    assert "wait on the host" not in render_plan(plan_with())
    strategy = HybridParallelStrategy("pp2", offload_activations=True, plan={"offload_activations": {"blocks.3": False}})
    assert plan_with(**strategy.options.overrides).chain.offload_activations == (True, True, True, False)  # type: ignore[union-attr]


def test_what_is_refused() -> None:
    with pytest.raises(PlanError, match=r"plan.offload_activations=\{blocks.0: host\}: write true or false"):
        plan_with(offload_activations={"blocks.0": "host"})
    with pytest.raises(
        PlanError, match=r"plan.offload_activations=\{layers.\*: True\} matches no block; the module has blocks.0, "
    ):
        plan_with(offload_activations={"layers.*": True})
    for word in ("selective", "auto"):
        with pytest.raises(PlanError, match=rf"offload_activations of blocks.1 with recompute={word}: .* use recompute=full"):
            plan_with(offload_activations={"*": True}, recompute={"blocks.1": word})
    with pytest.raises(PlanError, match=r"compile with offload_activations: .* leave one of them out"):
        plan_with(offload_activations={"*": True}, compile="eager")
    with pytest.raises(
        ModelError, match=r"offload_activations works block by block, and Unordered has no chain .* plan.chain=PATH"
    ):
        plan_of(Unordered(Block), "single", overrides={"offload_activations": {"*": True}})
