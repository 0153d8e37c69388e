"""``recompute: auto``: as few blocks as fit, what is said of it, and a run that equals one process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import pytest
import pytorch_lightning as pl
import torch
import yaml
from torch.utils.data import DataLoader

from benchmarks.storage import make_optimizer
from lightning_par import HybridParallelStrategy
from lightning_par.errors import ConfigurationError, ModelError, PlanError
from lightning_par.host.memory import Foresight
from lightning_par.install import install
from lightning_par.memory.fit import fit_recompute
from lightning_par.memory.living import LivingTensors
from lightning_par.plan import Plan, render_plan
from lightning_par.plan.memory import RankMemory
from lightning_par.plan.plan import CompilePlan
from lightning_par.runtime.axis import LocalAxis
from lightning_par.zero.option import ZeroOptions
from tests.models import gpt, make_batch
from tests.parity import check_parity
from tests.planning import Block, Chain, plan_of, quiet_trainer, tokens

KEPT = {"none": 100, "selective": 40, "full": 10}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


# ---------------------------------------------------------------------- the choice


def foresee(plan: Plan) -> tuple[RankMemory, ...]:
    """Ranks that store so much for each block, the first one's twice, and 1000 besides."""
    assert plan.chain is not None
    found = []
    for pp in range(plan.layout.pp):
        held = sum(KEPT[plan.chain.recompute[index]] for index in plan.blocks_at(pp))
        found.append(RankMemory(400, 400, 200, held * (2 - pp), 0))
    return tuple(found)


def chain_plan(word: str = "pp2", depth: int = 6) -> Plan:
    return plan_of(Chain(Block, depth=depth), word)


def words(plan: Plan) -> tuple[str, ...]:
    assert plan.chain is not None
    return plan.chain.recompute


def levels(blocks: int) -> Iterator[tuple[str, ...]]:
    """All choices of a rank, least work first."""
    yield from (("selective",) * k + ("none",) * (blocks - k) for k in range(blocks))
    yield from (("full",) * k + ("selective",) * (blocks - k) for k in range(blocks + 1))


def test_the_least_that_fits_is_chosen_for_each_rank() -> None:
    plan = chain_plan()
    for budget in range(1060, 1700, 7):
        chosen = words(fit_recompute(plan, range(6), budget, foresee))
        for pp, factor in ((0, 2), (1, 1)):
            fitting = (each for each in levels(3) if 1000 + factor * sum(KEPT[word] for word in each) <= budget)
            assert chosen[3 * pp : 3 * pp + 3] == next(fitting), (budget, pp)


def test_few_forecasts_are_made() -> None:
    calls = []

    def counted(plan: Plan) -> tuple[RankMemory, ...]:
        calls.append(plan)
        return foresee(plan)

    fit_recompute(chain_plan("pp2", 24), range(24), 2000, counted)
    assert len(calls) <= 3 + 5  # none, all, the choice; and halves of 24 levels


def test_blocks_that_the_user_speaks_for_stay() -> None:
    plan = chain_plan()
    assert plan.chain is not None
    fixed = replace(plan, chain=replace(plan.chain, recompute=("none", "none", "none", "full", "none", "none")))
    assert words(fit_recompute(fixed, [1, 2, 4, 5], 1400, foresee)) == ("none", "selective", "selective", "full", "none", "none")


def test_compiled_blocks_have_no_selective() -> None:
    plan = replace(chain_plan(), compilation=CompilePlan("eager", ()))
    assert words(fit_recompute(plan, range(6), 1400, foresee)) == ("full", "full", "none", "none", "none", "none")


def test_the_plan_says_what_was_chosen_and_by_how_much() -> None:
    plan = fit_recompute(chain_plan(), range(6), 1400, foresee)
    assert plan.notes[-2:] == (
        "recompute=auto: ranks at pp 0 store 1.6 KiB with no more blocks recomputed, 200 B more than they have: of 3 blocks "
        "2 selective, with which they store 1.3 KiB",
        "recompute=auto: ranks at pp 1 store 1.3 KiB with no more blocks recomputed, of the 1.4 KiB that they have: none is",
    )
    assert Plan.from_dict(yaml.safe_load(yaml.safe_dump(plan.to_dict()))) == plan
    rendered = render_plan(plan)
    assert "Memory of a rank" in rendered and "blocks.[0-1] selective, blocks.[2-5] none" in rendered
    assert "gathered" not in rendered.partition("Modules")[0]
    assert "Memory of a rank" not in render_plan(chain_plan())


def test_what_does_not_fit_says_what_is_missing() -> None:
    with pytest.raises(
        ModelError,
        match=r"memory_gib=9.537e-07: recompute=auto: with every open block recomputed in full, ranks at pp 0 of pp2_mb4 store "
        r"1.0 KiB \(parameters 400 B, gradients 400 B, states 200 B, activations 60 B\), 36 B more than they have: "
        r"memory_gib=0.001 would fit, or give more ranks to tp or pp, or cut the batch into more microbatches",
    ):
        fit_recompute(chain_plan(), range(6), 1024, foresee)
    with pytest.raises(ModelError, match=r"memory_gib=9.537e-07: ranks at pp 0 of pp2_mb4 store 1.6 KiB"):
        fit_recompute(chain_plan(), (), 1024, foresee)


# ---------------------------------------------------------------------- real forecasts


def test_a_real_plan_fits_and_one_block_less_would_not() -> None:
    module = gpt()
    batch = make_batch(0, 8)
    plan = plan_of(module, "tp2_pp2", batch)
    real = Foresight(module, batch, [make_optimizer(module)], "1f1b")
    most, least = real(plan), real(plan_of(module, "tp2_pp2", batch, {"recompute": {"*": "full"}}))
    budget = (max(memory.total for memory in most) + max(memory.total for memory in least)) // 2
    chosen = fit_recompute(plan, range(4), budget, real)
    assert chosen.chain is not None and plan.chain is not None
    assert max(memory.total for memory in chosen.memory) <= budget
    for pp in range(2):
        mine = [chosen.chain.recompute[index] for index in plan.blocks_at(pp)]
        before = next(one for one, two in pairwise([("none", "none"), *levels(2)]) if list(two) == mine)
        if mine == ["none", "none"]:
            continue
        recompute = list(chosen.chain.recompute)
        for index, word in zip(plan.blocks_at(pp), before, strict=True):
            recompute[index] = word  # type: ignore[call-overload]
        assert real(replace(chosen, chain=replace(chosen.chain, recompute=tuple(recompute))))[pp].total > budget


def test_the_peak_is_that_of_a_run() -> None:
    """In one process, where no message is on its way: gradients, activations and what operations give each other, at once."""
    for recompute in ({}, {"*": "selective"}, {"*": "full"}):
        torch.manual_seed(0)
        module, batch = gpt(), make_batch(0, 8)
        plan = plan_of(module, "dp1_mb4", batch, {"recompute": recompute})
        expected = Foresight(module, batch, [make_optimizer(module)], "1f1b")(plan)[0]
        install(module, plan, 0, LocalAxis("tp", 1, 0), torch.device("cpu"))
        with LivingTensors([*module.parameters(), *module.buffers(), *batch.values()]) as living:
            for first in range(0, 8, 2):
                piece = {name: tensor[first : first + 2] for name, tensor in batch.items()}
                loss = module.training_step(piece, 0)
                loss.backward()
                loss = loss.detach()
        measured = living.peak_bytes
        assert abs(measured - (expected.gradients + expected.activations + expected.working)) <= 0.01 * measured, recompute


# ---------------------------------------------------------------------- as a user meets it


def fit(module: pl.LightningModule, word: str = "pp2", **options: Any) -> None:
    plan = options.pop("plan", None)
    strategy = HybridParallelStrategy(word, plan=plan, print_plan=False, **options)
    trainer = quiet_trainer(word, 2, strategy=strategy, max_steps=1)
    trainer.fit(module, DataLoader([tokens(8)], batch_size=None))  # type: ignore[arg-type]


class Needy(Chain):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__(Block, depth=4)
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Reading(Chain):
    """Goes another way by a value, which the dry run makes up, and has as many rows as values say."""

    def __init__(self) -> None:
        super().__init__(Block, depth=4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = super().forward(tokens)
        return x[tokens > 3]


def test_words_that_cannot_work() -> None:
    with pytest.raises(PlanError, match="recompute=some: use one of none, selective, full, auto"):
        HybridParallelStrategy("pp2", recompute="some")
    for wrong in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigurationError, match=f"memory_gib={wrong:g}: it is what each rank may store, and must be positive"):
            HybridParallelStrategy("pp2", memory_gib=wrong)
    with pytest.raises(ConfigurationError, match=r"recompute=auto fits .* ranks share a CPU's: .* such as memory_gib=4"):
        fit(Chain(Block, depth=4), recompute="auto")
    with pytest.raises(ConfigurationError, match=r"recompute=auto fits .* ranks share a CPU's"):
        fit(Chain(Block, depth=4), plan={"recompute": {"blocks.0": "auto"}})
    with pytest.raises(ModelError, match=r"memory_gib=1e-05: ranks at pp 0 of pp2_mb4 store .* more than they have"):
        fit(Chain(Block, depth=4), memory_gib=1e-5)
    with pytest.raises(ModelError, match=r"memory_gib=1e-05: recompute=auto: with every open block recomputed in full"):
        fit(Chain(Block, depth=4), recompute="auto", memory_gib=1e-5)


def test_what_fits_instead_is_named() -> None:
    module, batch = Needy(torch.optim.Adam), tokens(8)

    def most(word: str) -> int:
        return max(
            memory.total
            for memory in Foresight(module, batch, [module.configure_optimizers()], "1f1b")(plan_of(module, word, batch))
        )

    assert most("dp2_zero1") < most("dp2")
    with pytest.raises(ModelError, match=r"more microbatches \(mb\): use parallel=dp2_zero1 or parallel=pp2$"):
        fit(module, "dp2", memory_gib=most("dp2_zero1") / 2**30)


@pytest.mark.parametrize(("make", "name"), [(torch.optim.LBFGS, "LBFGS"), (lambda _: 1 / 0, "none before the training")])
def test_an_optimizer_that_is_not_known(make: Callable[[Any], Any], name: str) -> None:
    with pytest.raises(ModelError, match=rf"cannot be foreseen: .* Needy.configure_optimizers gives {name}: say recompute=none"):
        fit(Needy(make), recompute="auto", memory_gib=4)


def test_a_step_that_needs_values() -> None:
    with pytest.raises(ModelError, match=r"cannot be foreseen: Reading.training_step needs values of tensors.*say recompute=none"):
        fit(Reading(), recompute="auto", memory_gib=4)


def test_an_option_of_zero_that_has_no_formula() -> None:
    options = ZeroOptions(reduce="microbatch", hpz_partition_size=2, config={"zero_optimization": {"sub_group_size": 9}})
    module, batch = gpt(), make_batch(0, 8)
    with pytest.raises(ModelError, match=r"cannot be foreseen with zero.hpz_partition_size=2, zero.config: say recompute=none"):
        Foresight(module, batch, [make_optimizer(module)], "1f1b", options=options)


def test_parity() -> None:
    torch.manual_seed(0)
    module, batch = gpt(), make_batch(0, 8)
    plan = plan_of(module, "pp2", batch)
    real = Foresight(module, batch, [make_optimizer(module)], "1f1b")
    budget = max(memory.total for memory in real(plan)) - 1
    chosen = fit_recompute(plan, range(4), budget, real)
    assert len(set(words(chosen))) > 1  # some and not all
    check_parity({"gpt": gpt}, "pp2", recompute="auto", memory_gib=budget / 2**30)
