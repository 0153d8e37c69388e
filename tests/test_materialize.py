"""Models built without memory: every weight and buffer is, bit for bit, what the constructor makes in one process."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn

from lightning_par.demo.gpt import GPT
from lightning_par.errors import ConfigurationError, ModelError, ReplicaError
from lightning_par.host.construction import configuring, construct, guard_setup
from lightning_par.install import install, shard_parameters
from lightning_par.materialize import (
    LateValues,
    deferred_init,
    give_values,
    is_deferred,
    match_weights,
    materialize_attributes,
    materialize_rest,
    materialize_shard,
    share_records,
    whole_value,
)
from lightning_par.materialize.stream import CELL, skip
from lightning_par.runtime.axis import GroupAxis, LocalAxis
from lightning_par.runtime.parameter import Split
from tests.models import VOCABULARY, ByteModel, TransformersModel, gpt, gpt2, llama, make_batch
from tests.parity import check_parity
from tests.plain import check_precisions
from tests.planning import plan_of, quiet_trainer
from tests.ranks import run_ranks
from tests.zoo import ZOO

Make = Callable[[], nn.Module]


class Awkward(nn.Module):
    """Every way of making weights that is known to us."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 17, padding_idx=3)
        self.up, self.convolution = nn.Linear(17, 33), nn.Conv1d(3, 5, 3)
        self.truncated, self.cut = nn.Parameter(torch.empty(40, 30)), nn.Parameter(torch.empty(40, 30))
        nn.init.trunc_normal_(self.truncated, std=0.02)
        nn.init.trunc_normal_(self.cut)  # bounds at two deviations: drawn again and again
        self.scaled = nn.Parameter(torch.randn(7, 5) * 0.3)
        self.positions = nn.Parameter(torch.zeros(1, 9, 9))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.erfinv = nn.Parameter(torch.empty(33, 19))  # trunc_normal_ as it once was
        with torch.no_grad():
            self.erfinv.uniform_(-0.9, 0.9).erfinv_().mul_(0.02 * math.sqrt(2)).add_(0.1).clamp_(0.0, 0.2)
        self.register_buffer("mask", torch.tril(torch.ones(300, 300)).view(1, 1, 300, 300), persistent=False)
        self.register_buffer("frequency", 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8))
        self.register_buffer("table", torch.outer(torch.arange(1000).float(), torch.arange(100).float()), persistent=False)
        self.copied, self.head = copy.deepcopy(self.up), nn.Linear(17, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]
        self.drawn, self.chosen = torch.rand(3).tolist(), int(torch.randint(10, ()))
        self.attention, self.recurrent = nn.MultiheadAttention(16, 4), nn.LSTM(5, 6)
        self.orthogonal, self.sparse = nn.Parameter(torch.empty(20, 20)), nn.Parameter(torch.empty(20, 20))
        nn.init.orthogonal_(self.orthogonal)
        nn.init.sparse_(self.sparse, 0.3)
        self.apply(self._draw)
        for name, parameter in self.named_parameters():
            if name.endswith("out_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(4))
        with torch.no_grad():
            self.copied.weight.mul_(2)
            self.copied.weight[:3] *= 3
            self.copied.weight[5, 2:4] = 0.5
            self.copied.bias.copy_(torch.arange(33.0))
        self.lower = nn.Linear(20, 20).to(torch.bfloat16)
        nn.init.normal_(self.lower.weight)
        self.doubled = nn.Parameter(torch.randn(40, dtype=torch.float64))
        self.own = nn.Parameter(torch.empty(20, 20).normal_(generator=torch.Generator().manual_seed(7)))
        torch.manual_seed(11)
        self.seeded = nn.Parameter(torch.randn(30, 3))
        with torch.random.fork_rng():
            self.forked = nn.Parameter(torch.randn(30, 3))
        self.beside = torch.randn(4, 4)  # neither parameter nor buffer
        self.listed = [torch.rand(3)]

    def _draw(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.02)
            if module.bias is not None:
                module.bias.data.zero_()


def build(make: Make, init: str | None = "exact") -> tuple[nn.Module, torch.Tensor]:
    """A module, and what is drawn after it."""
    torch.manual_seed(5)
    if init is None:
        return make(), torch.rand(3)
    with deferred_init(init):
        module = make()
    return module, torch.rand(3)


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def splits(tensor: torch.Tensor) -> Iterator[tuple[Split, int]]:
    """Even, uneven and fused cuts of a tensor."""
    for dim in range(min(2, tensor.dim())):
        size = tensor.shape[dim]
        for segments in [(size,), (size // 3, size - size // 3)][: 1 + (size > 3)]:
            yield from ((Split(dim, segments), ranks) for ranks in (2, 4))


@pytest.mark.parametrize("make", [Awkward, *ZOO.values()], ids=["awkward", *ZOO])
def test_values_are_those_of_one_process(make: Make) -> None:
    (module, drawn), (other, drawn_after) = build(make, None), build(make)
    assert torch.equal(drawn, drawn_after), "the generator is not where one process leaves it"
    expected, held = tensors(module), tensors(other)
    assert expected.keys() == held.keys()
    assert sum(is_deferred(tensor) for tensor in held.values()) > len(held) / 3
    parameters = dict(other.named_parameters())
    materialize_rest(other)
    for name, tensor in expected.items():
        assert torch.equal(tensors(other)[name], tensor), name
    assert all(value is parameters[name] for name, value in other.named_parameters()), "parameters stay the objects they are"
    for (path, child), twin in zip(module.named_modules(), other.modules(), strict=True):
        for key, value in vars(child).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(twin, key)), f"{path}.{key}"


def test_generators_of_the_user_are_left_where_one_process_leaves_them() -> None:
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    expected = (
        torch.empty(40, 30).normal_(generator=generators[0]),
        nn.init.trunc_normal_(torch.empty(9, 9), generator=generators[0]),
    )
    with deferred_init():
        normal = torch.empty(40, 30).normal_(generator=generators[1])
        truncated = nn.init.trunc_normal_(torch.empty(9, 9), generator=generators[1])
    assert torch.equal(whole_value(normal), expected[0]) and torch.equal(whole_value(truncated), expected[1])
    assert torch.equal(materialize_shard(truncated, None, 1, 0), expected[1])
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_what_a_constructor_reads_is_computed() -> None:
    (module, _), (other, _) = build(Awkward, None), build(Awkward)
    for name in ("rates", "drawn", "chosen"):
        assert getattr(module, name) == getattr(other, name), name
    materialize_attributes(other)
    assert torch.equal(module.beside, other.beside) and torch.equal(module.listed[0], other.listed[0])  # type: ignore[arg-type, index]
    assert other.head.weight is other.embedding.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("init", ["exact", "fast"])
def test_a_shard_is_a_part_of_the_whole(init: str) -> None:
    module, _ = build(Awkward, init)
    for name, tensor in tensors(module).items():
        if is_deferred(tensor):
            whole = whole_value(tensor)
            assert torch.equal(materialize_shard(tensor, None, 1, 0), whole), name
            for split, size in splits(tensor):
                for coordinate in range(size):
                    shard = materialize_shard(tensor, split, size, coordinate)
                    assert torch.equal(shard, split.shard(whole, size, coordinate)), f"{name}: {split} at {coordinate} of {size}"


@pytest.mark.parametrize("init", ["exact", "fast"])
@pytest.mark.parametrize("numel", [CELL + 5, CELL + 16, 2 * CELL - 3, 2 * CELL])
def test_weights_of_several_pieces(numel: int, init: str) -> None:
    """Pieces end where torch begins a group of 16 numbers, and it draws the last 16 a second time."""

    def make() -> nn.Module:
        module = nn.Module()
        module.normal, module.uniform = nn.Parameter(torch.randn(numel) * 3), nn.Parameter(torch.empty(numel).uniform_(-1, 2))
        module.truncated = nn.Parameter(nn.init.trunc_normal_(torch.empty(numel), 0.1, 1.0, -1.5, 1.0))
        module.lower = nn.Parameter(nn.init.trunc_normal_(torch.empty(numel, dtype=torch.bfloat16), std=0.02))
        return module

    (module, _), (other, _) = build(make, None), build(make, init)
    for name, tensor in tensors(other).items():
        expected = tensors(module)[name].detach() if init == "exact" else whole_value(tensor)
        for coordinate in range(3):
            shard = materialize_shard(tensor, Split(0, (numel,)), 3, coordinate)
            assert torch.equal(shard, Split(0, (numel,)).shard(expected, 3, coordinate)), f"{name} at {coordinate}"
        if name in ("truncated", "lower"):
            assert expected.min() >= -1.5 and expected.max() <= 1.0 and abs(expected.double().mean()) < 0.2
            continue
        error = 5 * 3 / math.sqrt(numel)  # five deviations of the mean of so many normal numbers
        assert abs(expected.mean() - (0 if name == "normal" else 0.5)) < error
        assert abs(expected.std() - (3 if name == "normal" else math.sqrt(0.75))) < error


def test_fast_weights_follow_from_the_seed_alone() -> None:
    (one, _), (same, _) = build(Awkward, "fast"), build(Awkward, "fast")
    torch.manual_seed(6)
    with deferred_init("fast"):
        other = Awkward()
    for name, tensor in tensors(one).items():
        if is_deferred(tensor):
            assert torch.equal(whole_value(tensor), whole_value(tensors(same)[name])), name
    assert not torch.equal(whole_value(one.up.weight), whole_value(other.up.weight))  # type: ignore[union-attr, arg-type]
    assert abs(whole_value(one.truncated).std() / 0.02 - 1) < 0.1  # type: ignore[arg-type]


@pytest.mark.parametrize("words", [0, 1, 5, 623, 624, 625, 2000])
@pytest.mark.parametrize("before", [0, 1, 7, 624])
def test_a_generator_is_moved_without_drawing(before: int, words: int) -> None:
    torch.manual_seed(3)
    torch.rand(before)
    start = torch.get_rng_state()
    torch.rand(words)
    expected = torch.rand(1000)
    torch.set_rng_state(skip(start, words))
    assert torch.equal(torch.rand(1000), expected)


def deferred(make: Callable[[], pl.LightningModule]) -> Callable[[], pl.LightningModule]:
    """The maker of a module that has no memory on the ranks of a run, and is an ordinary one in one process."""

    def make_deferred() -> pl.LightningModule:
        if not dist.is_initialized():
            return make()
        with deferred_init():
            return make()

    return make_deferred


@pytest.mark.parametrize("word", ["tp2_pp2", pytest.param("tp2_dp2_zero3", marks=pytest.mark.slow)])
def test_training_is_that_of_one_process(word: str) -> None:
    makers = {"GPT": deferred(gpt), "GPT-2, tied": deferred(gpt2), "Llama": deferred(llama)}
    check_parity(makers, word)


@pytest.mark.parametrize("words", [["tp2_mb2"], ["dp2_zero1_mb2", "dp2_zero3_mb2"]], ids=str)
def test_training_in_other_precisions_is_that_of_one_process(words: list[str]) -> None:
    check_precisions(deferred(gpt), words, ("bf16-mixed", "bf16-true"), steps=1)


def late_linear() -> tuple[nn.Linear, LateValues, torch.Tensor]:
    """A layer whose weight waits for its memory; what the weight is going to be."""
    torch.manual_seed(0)
    expected = nn.Linear(20, 30).weight.detach()
    torch.manual_seed(0)
    with deferred_init():
        linear = nn.Linear(20, 30)
    late, recorded = LateValues(), linear.weight.detach()
    late.add(linear.weight, torch.empty(30, 20), "weight", lambda out: materialize_shard(recorded, None, 1, 0, out))
    return linear, late, expected


def test_a_parameter_that_waits_for_its_memory_makes_an_optimizer_and_gets_its_values_where_it_is_read() -> None:
    linear, late, expected = late_linear()
    weight, view = linear.weight, linear.weight.data
    assert weight.shape == (30, 20) and weight.device.type == "cpu" and weight.untyped_storage().nbytes() == 0 and len(late) == 1
    optimizer = torch.optim.AdamW([weight], fused=True)
    with late.filling():
        assert torch.equal(view.t(), expected.t())
    assert not late and weight is linear.weight and torch.equal(weight, expected)
    weight.sum().backward()
    optimizer.step()
    assert not torch.equal(view, expected)
    late.fill(weight)  # once is enough
    assert torch.equal(view, weight)


def configure_wrongly(late: LateValues) -> None:
    with late.filling():
        raise ValueError("no optimizer")


def test_a_parameter_that_waits_can_be_printed_after_an_error() -> None:
    linear, late, _ = late_linear()
    with pytest.raises(ValueError, match="no optimizer"):
        configure_wrongly(late)
    assert not late and "0." in repr(linear.weight) and linear.weight.shape == (30, 20)


def test_a_shard_is_written_into_memory_of_another_dtype() -> None:
    _, _, expected = late_linear()
    with deferred_init():
        torch.manual_seed(0)
        weight = nn.Linear(20, 30).weight
    out = torch.full((30, 10), 7.0, dtype=torch.bfloat16)
    assert materialize_shard(weight, Split(1, (20,)), 2, 1, out) is out
    assert torch.equal(out, expected[:, 10:].bfloat16())


class Reading(pl.LightningModule):
    """A constructor that cannot run without values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(700, 500))
        self.norm = float(self.weight.detach().numpy().sum())
        self.rest = nn.Linear(4, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_constructor_that_reads_values_is_run_as_it_is() -> None:
    torch.manual_seed(5)
    expected, drawn = Reading(), torch.rand(3)
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match=r"Reading cannot run without memory for its weights \(.*\): every rank builds it whole"):
        module = construct(Reading, "exact")
    assert torch.equal(torch.rand(3), drawn) and module.norm == expected.norm
    assert is_deferred(module.weight), "a large weight waits in a file"
    assert torch.equal(materialize_shard(module.weight, Split(1, (500,)), 2, 1), expected.weight[:, 250:].detach())
    materialize_rest(module)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), expected.parameters(), strict=True))


def test_constructor_builds_without_trying() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = construct(Reading, "constructor")
    assert is_deferred(module.weight) and not is_deferred(module.rest.weight)


def test_what_the_user_raises_is_raised() -> None:
    def make() -> nn.Module:
        raise KeyError("width")

    with pytest.raises(KeyError, match="width"):
        construct(make, "exact")


def test_words() -> None:
    with pytest.raises(ConfigurationError, match=r"init=slow: there is no such way of making weights; there are exact, fast, con"):
        construct(Awkward, "slow")
    with pytest.raises(ConfigurationError, match=r"deferred_init\('slow'\): there are exact and fast"), deferred_init("slow"):
        pass


def test_a_hook_on_a_gradient_is_not_lost_silently() -> None:
    with deferred_init():
        module = nn.Linear(4, 4)
        module.weight.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(ModelError, match=r"weight has a hook on its gradient.*init=constructor"):
        give_values(module.weight, whole_value(module.weight), "weight")


class Late(ByteModel):
    """Fills weights in the hook for data."""

    def setup(self, stage: str) -> None:
        self.noise = torch.randn(3)
        self.network.head.weight.data.zero_()


@pytest.mark.parametrize("word", ["tp2", "single"])
def test_setup_comes_too_late_for_weights(word: str) -> None:
    with deferred_init():
        module = Late()
    trainer = quiet_trainer(word, 2 if word == "tp2" else 1, max_steps=1)
    batches: Any = [make_batch(0, 4)]
    with pytest.raises(
        ModelError, match=r"Late.setup calls zero_ on network.head.weight, and weights get their memory after it: do"
    ):
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    guard_setup(module)
    with pytest.raises(ModelError, match=r"Late\.setup calls zero_ on network\.head\.weight"):
        module.setup("fit")


class ConfiguredReading(ByteModel):
    """Reads values in the hook that builds the model."""

    def __init__(self) -> None:
        super().__init__()
        del self.network

    def configure_model(self) -> None:
        if not hasattr(self, "network"):
            self.network = ByteModel().network
            self.total = float(self.network.head.weight.detach().numpy().sum())


@pytest.mark.parametrize("init", ["exact", "constructor"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_the_hook_builds_whole(init: str) -> None:
    torch.manual_seed(4)
    expected, module = ConfiguredReading(), ConfiguredReading()
    torch.manual_seed(4)
    expected.configure_model()
    torch.manual_seed(4)
    notice = pytest.warns(UserWarning, match=r"ConfiguredReading\.configure_model cannot run")
    with notice if init == "exact" else nullcontext(), configuring(module, init):
        module.configure_model()
    assert module.total == expected.total
    materialize_rest(module)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), expected.parameters(), strict=True))


def other_constructors(rank: int, world_size: int) -> str:
    with deferred_init():
        module = nn.Linear(4, 20 + rank)
    try:
        share_records(module, GroupAxis("world", dist.group.WORLD, list(range(world_size)), rank))  # type: ignore[arg-type]
    except ReplicaError as error:
        return str(error)
    return ""


def test_ranks_that_build_other_models_are_told() -> None:
    first, second = run_ranks(other_constructors, 2)
    assert first == "" and "the constructor of Linear made other tensors on rank 1 than on rank 0: seed what" in second


def test_only_the_shards_of_a_rank_are_made() -> None:
    """One coordinate of tp2_pp2, played in one process: what another stage holds never gets memory."""
    torch.manual_seed(0)
    whole: Any = gpt2()
    torch.manual_seed(0)
    with deferred_init():
        module: Any = gpt2()
    plan = plan_of(module, "tp2_pp2", {"tokens": torch.zeros(4, 8, dtype=torch.long)})
    shard_parameters(module, plan.parameters, 1, LocalAxis("tp", 2, 1), torch.device("cpu"))
    for parameter in plan.parameters:
        for alias, holders in parameter.aliases:
            path, _, name = alias.rpartition(".")
            held = getattr(module.get_submodule(path), name)
            assert held.untyped_storage().nbytes() == held.itemsize if 1 not in holders else not held.is_meta, alias
            if 1 in holders:
                expected, split = whole.get_parameter(alias).detach(), parameter.spec.split
                assert torch.equal(held, expected if split is None else split.shard(expected, 2, 1)), alias


GIB = 1 << 30


def large_llama(layers: int) -> pl.LightningModule:
    """A model of 0.5 GiB and 0.2 for each layer, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=16)
    return TransformersModel(LlamaForCausalLM(LlamaConfig(**sizes)))  # type: ignore[arg-type]


def of_three_gib(kind: str) -> pl.LightningModule:
    """A model of 3 GiB in fp32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if kind == "Llama":
        return large_llama(13)
    if kind == "GPT-2":
        return TransformersModel(GPT2LMHeadModel(GPT2Config(n_embd=2048, n_layer=14, n_head=16)))
    module = ByteModel()
    module.network = GPT(vocab_size=VOCABULARY, width=2048, depth=16, heads=16)
    module.network.scale = nn.Parameter(torch.randn(2048) * 0.02)  # type: ignore[assignment]
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2:
            nn.init.trunc_normal_(parameter, std=0.02)
        if name.endswith(("output.weight", "down.weight")):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * 16))
    return module


def resident(field: str) -> int:
    """Bytes of this process that are in memory: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def build_coordinate(pp: int, world_size: int, kind: str, init: str) -> dict[str, float]:
    """One coordinate of tp4_pp2 for each process, played there: what it took to build its part."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    base, start = resident("VmRSS"), time.process_time()
    with deferred_init(init):
        module = of_three_gib(kind)
    total = sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
    plan = plan_of(module, "tp4_pp2", {"tokens": torch.zeros(8, 17, dtype=torch.long)})
    install(module, plan, pp, LocalAxis("tp", 4, 1), torch.device("cpu"))
    shard = sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
    return {"total": total, "shard": shard, "peak": resident("VmHWM") - base, "seconds": time.process_time() - start}


def write_weights(rank: int, world_size: int, layers: int, folder: Path) -> None:
    large_llama(layers).model.save_pretrained(folder, max_shard_size="250MB")  # type: ignore[union-attr, operator]


def read_coordinate(pp: int, world_size: int, layers: int, folder: Path) -> dict[str, float]:
    """One coordinate of tp2_pp2 for each process, played there: what it took to read its part."""
    Path("/proc/self/clear_refs").write_text("5")
    base, start = resident("VmRSS"), time.process_time()
    with deferred_init("fast"):
        module = large_llama(layers)
    plan = plan_of(module, "tp2_pp2", {"tokens": torch.zeros(8, 17, dtype=torch.long)})
    install(module, plan, pp, LocalAxis("tp", 2, 1), torch.device("cpu"), weights=match_weights(module, folder))
    shard = sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
    return {"shard": shard, "peak": resident("VmHWM") - base, "seconds": time.process_time() - start}


@pytest.mark.slow
def test_shards_of_a_large_checkpoint(tmp_path: Path) -> None:
    """The same bound where they are read from files of 1.3 GiB; one whole embedding would be more than it leaves."""
    run_ranks(write_weights, 1, 4, tmp_path, timeout=300)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    for read in run_ranks(read_coordinate, 2, 4, tmp_path, timeout=300):
        assert read["peak"] < 1.1 * read["shard"] + 100e6, f"{read['peak'] / 2**20:.0f} MiB"
        assert read["seconds"] < 10


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "init"), [("Llama", "exact"), ("GPT-2", "exact"), ("truncated", "exact"), ("truncated", "fast")])
def test_a_model_larger_than_what_is_built(kind: str, init: str) -> None:
    """Peak memory is at most 1.1 times the shard and 100 MB, in less than 10 CPU seconds. One kind has every way of drawing."""
    for built in run_ranks(build_coordinate, 2, kind, init, timeout=300):
        assert 2.9 * GIB < built["total"] < 3.1 * GIB and built["shard"] < built["total"] / 5
        assert built["peak"] < 1.1 * built["shard"] + 100e6, f"{built['peak'] / 2**20:.0f} MiB"
        assert built["seconds"] < 10
