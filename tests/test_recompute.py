"""Recomputed blocks: the same numbers as kept ones, less memory, nothing asked of the module."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401

from benchmarks.counting import settled
from lightning_par import HybridParallelStrategy
from lightning_par.errors import ModelError, PlanError
from lightning_par.install import install
from lightning_par.layout import parse_layout
from lightning_par.plan import Plan, render_plan
from lightning_par.recompute.keep import is_costly
from lightning_par.runtime.axis import Axis, LocalAxis
from tests.axes import tp_axis
from tests.living import Living
from tests.models import VOCABULARY, EncoderClassifier, TransformersModel, gpt, gpt2, llama, make_batch
from tests.parity import Run, check_parity, train_rank
from tests.planning import Chain, Unordered, plan_of, tokens
from tests.ranks import run_ranks

MODES = ("none", "selective", "full")
RECOMPUTING = ("selective", "full")
WIDTH, CPU, ALONE = 16, torch.device("cpu"), LocalAxis("tp", 1, 0)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("pytorch_lightning", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


# ---------------------------------------------------------------------- parity


def dropping_encoder() -> pl.LightningModule:
    """Attention by hand, dropout on the scores and twice on the hidden state."""
    return EncoderClassifier(dropout=0.2)


def dropping_gpt2() -> pl.LightningModule:
    """Dropout inside of fused attention, and other dropout after it."""
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=64, resid_pdrop=0.2, attn_pdrop=0.2)
    return TransformersModel(GPT2LMHeadModel(config))


PLAIN = {"gpt": gpt, "llama": llama, "gpt2": gpt2}
DROPPING = {"encoder": dropping_encoder, "gpt2": dropping_gpt2}


@pytest.mark.parametrize("mode", RECOMPUTING)
@pytest.mark.parametrize("word", ["tp2", "pp2"])
def test_parity_with_one_process(word: str, mode: str) -> None:
    check_parity(PLAIN, word, recompute=mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", RECOMPUTING)
@pytest.mark.parametrize("word", ["tp2_pp2", "tp2_sp_pp2", "dp2_zero2", "dp2_zero3", "tp2_dp2_zero1", "tp2_pp2_dp2_zero3"])
def test_parity_in_more_layouts(word: str, mode: str) -> None:
    check_parity(PLAIN, word, recompute=mode)


def all_modes(rank: int, world_size: int, word: str) -> None:
    layout = parse_layout(word).resolve(world_size)
    for name, make in DROPPING.items():
        runs = {mode: train_rank(make, layout, rank, recompute=mode) for mode in MODES}
        for mode in RECOMPUTING:
            check_equal(f"{name} {mode}", runs["none"], runs[mode])


def check_equal(what: str, kept: Run, recomputed: Run) -> None:
    """Bit for bit: the same masks, and the same operations in the same order."""
    assert kept.losses == recomputed.losses, what
    for kind in ("gradients", "weights"):
        expected, found = getattr(kept, kind), getattr(recomputed, kind)
        assert expected.keys() == found.keys()
        assert not [name for name in expected if not torch.equal(expected[name], found[name])], f"{kind} of {what}"


@pytest.mark.parametrize("word", ["tp2", "tp2_sp", "pp2"])
def test_masks_of_dropout_are_drawn_again(word: str) -> None:
    run_ranks(all_modes, 2, word)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["tp2_pp2", "dp2_zero3"])
def test_masks_of_dropout_are_drawn_again_in_more_layouts(word: str) -> None:
    run_ranks(all_modes, parse_layout(word).world_size, word)


# ---------------------------------------------------------------------- one process


def installed(make: Callable[[], pl.LightningModule], mode: str, word: str = "single", tp: Axis = ALONE, batch: Any = None) -> Any:
    torch.manual_seed(0)
    module = make()
    install(module, plan_of(module, word, batch, {"recompute": {"*": mode}}), 0, tp, CPU)
    return module


def gradients(module: Any, batch: Any = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    module.training_step(tokens() if batch is None else batch, 0).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def check_alike(make: Callable[[], pl.LightningModule]) -> None:
    expected = gradients(installed(make, "none"))
    for mode in RECOMPUTING:
        found = gradients(installed(make, mode))
        assert expected.keys() == found.keys()
        assert not [name for name in expected if not torch.equal(expected[name], found[name])], mode


class Block(nn.Module):
    """The blocks of this file differ in what they do between the two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.num_forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_forwards += 1
        return x + self.down(self.between(self.up(self.norm(x))))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)


class Changing(Block):
    """Changes the result of a product in place."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x, inplace=True)


class Averaging(Block):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(32)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return self.batch_norm(x.transpose(1, 2)).transpose(1, 2).sigmoid()  # type: ignore[no-any-return]


class Autocasting(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Dropping(Block):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(F.dropout(x, 0.5) * torch.rand_like(x), 0.5)


@pytest.mark.parametrize("block", [Block, Changing, Averaging, Autocasting, Dropping])
def test_gradients_are_the_same_bit_for_bit(block: type[Block]) -> None:
    check_alike(lambda: Chain(block))


def test_a_block_runs_once_more_in_the_backward_and_once_in_evaluation() -> None:
    for mode, expected in (("none", 1), ("selective", 2), ("full", 2)):
        module = installed(lambda: Chain(Block), mode)
        module.training_step(tokens(), 0).backward()
        assert [block.num_forwards for block in module.blocks] == [expected] * 2
        with torch.no_grad():
            module.eval().training_step(tokens(), 0)
        assert [block.num_forwards for block in module.blocks] == [expected + 1] * 2


def test_running_statistics_are_updated_once() -> None:
    states = []
    for mode in MODES:
        module = installed(lambda: Chain(Averaging), mode)
        gradients(module)
        states.append({name: buffer.clone() for name, buffer in module.named_buffers()})
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])


def test_blocks_stay_what_they_are() -> None:
    module = installed(lambda: Chain(Block), "full")
    assert all(isinstance(block, Block) and type(block).__name__ == "Block" for block in module.blocks)


# ---------------------------------------------------------------------- objects among the arguments


class Cache:
    """Keys by block, as a model keeps them for generation: a block reads its own."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}

    def update(self, index: int, key: torch.Tensor) -> torch.Tensor:
        self.keys[index] = torch.cat([self.keys[index], key], 1) if index in self.keys else key
        return self.keys[index]


class Caching(Block):
    index = 0

    def forward(self, x: torch.Tensor, cache: Cache | None = None, sizes: list[int] | None = None) -> torch.Tensor:
        assert cache is not None and sizes is not None
        keys = cache.update(self.index, self.up(x))
        sizes.append(keys.shape[1])
        return x + self.down(keys.sigmoid())


class CachedChain(Chain):
    def __init__(self) -> None:
        super().__init__(Caching, depth=3)
        for index, block in enumerate(self.blocks):
            block.index = index  # type: ignore[assignment]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, cache = self.embedding(tokens), Cache()
        self.sizes: list[int] = []
        for block in self.blocks:
            x = block(x, cache=cache, sizes=self.sizes)
        logits: torch.Tensor = self.head(x)
        return logits


def test_a_cache_among_the_arguments_is_as_it_was() -> None:
    check_alike(CachedChain)
    module = installed(CachedChain, "full")
    gradients(module)
    assert module.sizes == [6, 6, 6]


def test_what_a_block_did_not_read_of_a_cache_is_not_kept() -> None:
    assert living_bytes(CachedChain, "full") == living_bytes(lambda: Chain(Block, depth=3), "full")


# ---------------------------------------------------------------------- memory


def living_bytes(make: Callable[[], pl.LightningModule], mode: str) -> int:
    """Bytes of the blocks that are alive between forward and backward."""
    module = installed(make, mode)
    module.head, data = nn.Identity(), tokens()["tokens"]
    living = Living([*module.parameters(), data])
    with living:
        last = module(data)
    assert last.requires_grad
    return living.num_bytes()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_outlives_its_graph(mode: str) -> None:
    module, data = installed(lambda: Chain(Block), mode), tokens()["tokens"]
    for runs_backward in (False, True):
        with Living([*module.parameters(), data]) as living:
            loss = module(data).square().mean()
            if runs_backward:
                loss.backward()
                module.zero_grad()
        del loss
        assert living.num_bytes() == 0


def check_nothing_is_left(rank: int, world_size: int) -> None:
    axis, batch = tp_axis(), make_batch(0, 4)
    for word in ("tp2", "tp2_sp"):
        for mode in MODES:
            module = installed(gpt, mode, word, axis, batch)
            with Living([*module.parameters(), *batch.values()]) as living:
                loss = module.training_step(batch, 0)
                loss.backward()
                module.zero_grad()
            del loss
            assert settled(living.num_bytes) == 0, (word, mode)


def test_nothing_outlives_its_graph_over_tp() -> None:
    gc.disable()  # what is in a circle would stay until it runs
    try:
        run_ranks(check_nothing_is_left, 2)
    finally:
        gc.enable()


def test_activation_memory() -> None:
    positions, depth = 4 * 6, 3
    hidden, inner, statistics = positions * WIDTH * 4, positions * 32 * 4, positions * 2 * 4
    kept = {mode: living_bytes(lambda: Chain(Block, depth=depth), mode) for mode in MODES}
    # hidden state, norm and its statistics, the two of gelu; the last output is not needed, but it is what the model returns
    assert kept["none"] == depth * (2 * hidden + statistics + 2 * inner) + hidden == 29_760
    # hidden state, both products; the second is not needed, but nobody knows when it is made
    assert kept["selective"] == depth * (2 * hidden + inner) + hidden == 19_968
    # hidden state
    assert kept["full"] == depth * hidden + hidden == 6_144


# ---------------------------------------------------------------------- collectives


class Sums(TorchDispatchMode):
    """Counts the collectives that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def collectives(make: Callable[[], pl.LightningModule], word: str) -> dict[str, tuple[Counter[str], Counter[str]]]:
    """What runs in the forward and in the backward of one step, by mode."""
    counts, grads = {}, {}
    for mode in MODES:
        module = installed(make, mode, word, tp_axis(), make_batch(0, 4))
        with Sums() as forward:
            loss = module.training_step(make_batch(0, 4), 0)
        with Sums() as backward:
            loss.backward()
        counts[mode] = (forward.calls, backward.calls)
        grads[mode] = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        assert all(torch.equal(grads["none"][name], grad) for name, grad in grads[mode].items())
    return counts


def check_collectives(rank: int, world_size: int) -> None:
    depth = 4
    for make, sums in ((gpt, 1), (EncoderClassifier, 2)):  # the last sum of a block is needed again where a norm reads it
        again = {
            "tp2": Counter(allreduce_=sums * depth),
            "tp2_sp": Counter(_allgather_base_=2 * depth, _reduce_scatter_base_=sums * depth),
        }
        for word, expected in again.items():
            counts = collectives(make, word)
            forward, backward = counts["none"]
            assert counts["selective"] == (forward, backward), word
            assert counts["full"] == (forward, backward + expected), word


def test_collectives_that_are_run_again() -> None:
    run_ranks(check_collectives, 2)


def changed_later(rank: int, world_size: int) -> None:
    class Leaking(Block):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(32, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = self.down(self.up(x))
            self.leaked = total.detach()
            return self.norm(total) + x

    module = installed(lambda: Chain(Leaking), "selective", "tp2", tp_axis())
    loss = module.training_step(tokens(), 0)
    module.blocks[0].leaked.add_(1)
    with pytest.raises(ModelError, match=r"recompute=selective: the sum of a row layer was changed in place.*use recompute=full"):
        loss.backward()


def test_a_sum_that_is_changed_after_its_block() -> None:
    run_ranks(changed_later, 2)


def test_fused_attention_is_costly_where_it_draws_nothing() -> None:
    aten, x = torch.ops.aten, torch.zeros(())
    flash, efficient = aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default
    assert is_costly(flash, (x, x, x), {}) and is_costly(flash, (x, x, x, 0.0, True), {})
    assert not is_costly(flash, (x, x, x, 0.1), {})
    assert is_costly(efficient, (x, x, x, None, True), {}) and not is_costly(efficient, (x, x, x, None, True, 0.1), {})
    assert is_costly(aten.mm.default, (x, x), {}) and not is_costly(aten.bmm.default, (x, x), {})


# ---------------------------------------------------------------------- the plan


def plan_with(word: str = "pp2", **lines: Any) -> Plan:
    return plan_of(Chain(Block, depth=4), word, overrides=lines)


def modes(plan: Plan) -> tuple[str, ...]:
    assert plan.chain is not None
    return plan.chain.recompute


def test_a_later_pattern_wins() -> None:
    assert modes(plan_with()) == ("none",) * 4
    plan = plan_with(recompute={"*": "full", "blocks.0": "none", "blocks.[23]": "selective"})
    assert modes(plan) == ("none", "full", "selective", "selective")
    assert Plan.from_dict(yaml.safe_load(yaml.safe_dump(plan.to_dict()))) == plan
    assert "recompute: blocks.0 none, blocks.1 full, blocks.[2-3] selective" in render_plan(plan)
    assert "recompute" not in render_plan(plan_with())


def test_the_option_of_the_strategy_comes_first() -> None:
    strategy = HybridParallelStrategy("pp2", plan={"recompute": {"blocks.0": "none"}}, recompute="full")
    assert modes(plan_with(**strategy.options.overrides)) == ("none", "full", "full", "full")


def test_words_and_patterns_that_are_wrong() -> None:
    with pytest.raises(PlanError, match="recompute=some: use one of none, selective, full"):
        HybridParallelStrategy("pp2", recompute="some")
    with pytest.raises(
        PlanError, match=r"plan.recompute=\{blocks.0: half\}: what is recomputed of a block is one of none, selective, full"
    ):
        plan_with(recompute={"blocks.0": "half"})
    with pytest.raises(PlanError, match=r"plan.recompute=\{layers.\*: full\} matches no block; the module has blocks.0, .*correct"):
        plan_with(recompute={"layers.*": "full"})


def test_without_a_chain() -> None:
    with pytest.raises(
        ModelError,
        match=r"recompute=full works block by block, and Unordered has no chain of blocks that the step runs in order \(looked at "
        r"blocks: .*\): name the container of the blocks with plan.chain=PATH, or use recompute=none",
    ):
        plan_of(Unordered(Block), "single", overrides={"recompute": {"*": "full"}})
    assert plan_of(Unordered(Block), "single", overrides={"recompute": {"*": "none"}}).chain is None
