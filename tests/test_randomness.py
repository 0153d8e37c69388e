"""Random numbers in a layout: the statistics of one process, one mask for what ranks hold together, others for parts.

The statistics are compared on the losses of `NUM_DRAWS` training steps with weights that stay as they are: every step
draws from a seed of its own. The means must agree within four standard errors of their difference. The logarithm of a
variance of n numbers near normal has the variance 2 / (n - 1), so that of a ratio of two has 4 / (n - 1); it, too, must
be zero within four times the root. Equal masks on both halves of an activation would double the variance of the sum of
them; that the test sees this is tested as well.
"""

from __future__ import annotations

import random
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import log, sqrt
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_par import HybridParallelStrategy
from lightning_par.layout import parse_layout
from lightning_par.runtime.axis import GroupAxis
from lightning_par.runtime.parameter import get_spec
from lightning_par.runtime.random import sharded_stream
from lightning_par.runtime.streams import MicrobatchStreams
from lightning_par.tensor import ShardedTensor
from lightning_par.tensor.rules import attention, stochastic
from tests.models import VOCABULARY, make_batch
from tests.parity import MakeModel
from tests.ranks import machines, run_ranks

NUM_DRAWS, WIDTH, HEADS, RATE = 250, 16, 4, 0.3
CPU = torch.device("cpu")


class DroppingBlock(nn.Module):
    """Drops whole activations, hidden units and attention probabilities.

    Args:
        fused: attention by one function, which views heads by local sizes; or written out, by global sizes.
        recomputed: what the block itself computes again in the backward: nothing, its ``mlp``, or ``all``.
    """

    def __init__(self, fused: bool, recomputed: str = "") -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.output, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.probabilities, self.units, self.stream_1, self.stream_2 = (nn.Dropout(RATE) for _ in range(4))
        self.fused, self.recomputed = fused, recomputed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.run, x, use_reentrant=False) if self.recomputed == "all" else self.run(x)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.stream_1(self.output(self.attend(self.norm_1(x))))
        return x + (checkpoint(self.mlp, x, use_reentrant=False) if self.recomputed == "mlp" else self.mlp(x))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.stream_2(self.down(self.units(F.gelu(self.up(self.norm_2(x))))))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        heads = (*x.shape[:2], -1 if self.fused else HEADS, WIDTH // HEADS)
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.query, self.key, self.value))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=RATE if self.training else 0.0)
        else:
            mixed = self.probabilities((q @ k.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5).softmax(-1)) @ v
        return mixed.transpose(1, 2).reshape(*x.shape[:2], -1)


class Still(pl.LightningModule):
    """A step whose weights stay as they are."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Dropping(Still):
    """A language model with dropout wherever there can be one; the first acts before the blocks."""

    def __init__(self, fused: bool, recomputed: str = "", depth: int = 2) -> None:
        super().__init__()
        self.embedding, self.before = nn.Embedding(VOCABULARY, WIDTH), nn.Dropout(RATE)
        self.blocks = nn.ModuleList([DroppingBlock(fused, recomputed) for _ in range(depth)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x = self.embedding(batch["tokens"])
        x = x * self.before(torch.ones_like(x))  # not of x, which is zero on a later stage
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), batch["tokens"][:, 1:].flatten())


class EqualUnits(Still):
    """All hidden units are one, so that the loss is the mean of their masks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.units, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Dropout(RATE), nn.Linear(2 * WIDTH, 1)
        for parameter in self.parameters():
            nn.init.ones_(parameter)
        self.blocks = nn.ModuleList([nn.Sequential(self.up, self.units, self.down)])

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.blocks[0](torch.ones(len(batch["tokens"]), WIDTH)).mean()
        return loss


MODELS: dict[str, MakeModel] = {
    "fused attention": lambda: Dropping(fused=True),
    "attention written out": lambda: Dropping(fused=False),
    "equal units": EqualUnits,
}


@dataclass
class Seen:
    """What one rank saw of a run.

    Attributes:
        masks: by the path of a Dropout and the step, what each of its calls kept, in their order.
        losses: of every step.
        gradients: of the last step.
        num_gathers: sharded tensors made whole for a function without a rule.
    """

    masks: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    num_gathers: int = 0


class Watch(pl.Callback):
    """Writes down a run."""

    def __init__(self) -> None:
        self.seen = Seen()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def see(path: str, child: nn.Module, args: Any, output: torch.Tensor) -> None:
            local = output.local if isinstance(output, ShardedTensor) else output
            kept = (local.detach() != 0).cpu().numpy().tobytes()
            self.seen.masks.setdefault((path, trainer.global_step), []).append(kept)

        for path, child in pl_module.named_modules():
            if isinstance(child, nn.Dropout):
                child.register_forward_hook(partial(see, path))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.gradients = {name: p.grad.cpu().numpy().copy() for name, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, HybridParallelStrategy):
            self.seen.num_gathers = trainer.strategy.mesh.tp.gathers.total()


def train(
    make: MakeModel, word: str, num_steps: int, *callbacks: pl.Callback, resumed: Path | None = None, seed: int = 0, **options: Any
) -> Seen:
    """Train a freshly made model in a layout, on the same batch for every replica and step. Collective over the world.

    Args:
        callbacks: what else acts.
        resumed: the checkpoint to go on from.
        seed: what the rank's script sets.
        options: of the strategy.
    """
    pl.seed_everything(seed, verbose=False)
    batches: Any = [make_batch(0, 4)] * num_steps
    module, watch = make(), Watch()
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    trainer = pl.Trainer(
        **machines(parse_layout(word).world_size),
        strategy="auto" if word == "single" else HybridParallelStrategy(word, print_plan=False, **options),
        max_steps=num_steps,
        callbacks=[watch, *callbacks],
        **dict.fromkeys(silent, False),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=resumed)
    return watch.seen


# ---------------------------------------------------------------------- statistics


def losses(rank: int, world_size: int, word: str, makers: dict[str, MakeModel], alike: bool = False) -> dict[str, list[float]]:
    """The losses of many steps of each model. Collective over the world.

    Args:
        alike: whether the ranks of a tp group wrongly draw alike for their parts.
    """
    if alike:
        for rules in (stochastic, attention):
            vars(rules)["sharded_stream"] = lambda axis, device: nullcontext()
    found = {}
    for name, make in makers.items():
        found[name] = train(make, word, NUM_DRAWS).losses
    return found


def distances(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """How far apart the means and the logarithms of the variances are, in standard errors; see the top of the file."""
    a, b = np.array(ours), np.array(theirs)
    of_means = (a.mean() - b.mean()) / sqrt((a.var(ddof=1) + b.var(ddof=1)) / NUM_DRAWS)
    return abs(of_means), abs(log(a.var(ddof=1) / b.var(ddof=1))) / sqrt(4 / (NUM_DRAWS - 1))


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    """The losses of one process."""
    (found,) = run_ranks(losses, 1, "single", MODELS)
    return found


@pytest.mark.parametrize(("word", "names"), [("tp2", list(MODELS)), ("tp2_sp", ["attention written out"])])
def test_losses_under_tp_have_the_statistics_of_one_process(word: str, names: list[str], alone: dict[str, list[float]]) -> None:
    for rank in run_ranks(losses, 2, word, {name: MODELS[name] for name in names}, timeout=180):
        for name, ours in rank.items():
            assert max(distances(ours, alone[name])) < 4, name


def test_the_statistics_tell_equal_masks_on_parts(alone: dict[str, list[float]]) -> None:
    first, _ = run_ranks(losses, 2, "tp2", {"equal units": EqualUnits}, True)
    of_means, of_variances = distances(first["equal units"], alone["equal units"])
    assert of_means < 4 < of_variances


# ---------------------------------------------------------------------- masks

STREAM, PARTS = ("stream_1", "stream_2"), ("probabilities", "units")


def masks(rank: int, world_size: int, words: list[str]) -> dict[str, Seen]:
    """Two steps in every layout. Collective over the world."""
    return {word: train(lambda: Dropping(fused=False), word, 2) for word in words}


def test_masks_are_equal_where_ranks_hold_the_same_and_differ_elsewhere() -> None:
    """One mask for each replica, step, microbatch and place; on activations in parts, for each tp rank too."""
    words = ["tp2_dp2_mb2", "tp2_pp2_mb2", "tp2_pp2_mb2_sp"]
    ranks = run_ranks(masks, 4, words)
    for word in words:
        layout = parse_layout(word)
        in_parts = PARTS + STREAM * layout.sp
        groups: dict[tuple[Any, ...], set[bytes]] = {}
        for rank, found in enumerate(ranks):
            at = layout.coordinate_of(rank)
            for (path, step), calls in found[word].masks.items():
                part = at.tp if path.endswith(in_parts) else None
                assert len(calls) == 2
                for microbatch, mask in enumerate(calls):
                    groups.setdefault((path, at.dp, step, microbatch, part), set()).add(mask)
        assert all(len(group) == 1 for group in groups.values()), f"{word}: ranks drop differently what they hold together"
        assert len(set().union(*groups.values())) == len(groups), f"{word}: one mask twice"
        num_places = 1 + 2 * len(STREAM + PARTS + in_parts)  # before two blocks, and in them
        assert len(groups) == num_places * (layout.dp or 1) * 2 * 2
        assert all(found[word].num_gathers == 0 for found in ranks), f"{word}: dropout gathers"


# ---------------------------------------------------------------------- recomputation and checkpoints


RECOMPUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing": ("", {}),
    "the middle of a block, by the user": ("mlp", {}),
    "a block, by the user": ("all", {}),
    "what is cheap, by the strategy": ("", {"recompute": "selective"}),
    "every block, by the strategy": ("", {"recompute": "full"}),
}


def recomputed(rank: int, world_size: int, word: str) -> dict[str, Seen]:
    """A step in every way to compute again what the backward needs. Collective over the world."""
    return {name: train(lambda by=by: Dropping(False, by), word, 1, **options) for name, (by, options) in RECOMPUTED.items()}  # type: ignore[misc]


@pytest.mark.parametrize("word", ["tp2_pp2_mb2", "tp2_pp2_mb2_sp"])
def test_recomputation_draws_the_same_masks(word: str) -> None:
    for rank in run_ranks(recomputed, 4, word):
        plain = rank.pop("nothing")
        for name, seen in rank.items():
            again = 0
            for place, calls in plain.masks.items():
                assert set(seen.masks[place]) == set(calls), f"{name}: {place}"
                again += len(seen.masks[place]) - len(calls)
            assert again > 0, f"{name} is computed once"
            for parameter, gradient in plain.gradients.items():
                np.testing.assert_array_equal(seen.gradients[parameter], gradient, err_msg=f"{name}: {parameter}")


class SaveAfter(pl.Callback):
    """Writes a checkpoint after a number of steps."""

    def __init__(self, num_steps: int, path: Path) -> None:
        self.num_steps, self.path = num_steps, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.num_steps:
            trainer.save_checkpoint(self.path)


def resumed(rank: int, world_size: int, word: str, folder: Path) -> tuple[Seen, Seen]:
    """A run of four steps, and one that goes on from its second. Collective over the world."""
    path = folder / "second.ckpt"
    whole = train(lambda: Dropping(fused=False), word, 4, SaveAfter(2, path))
    return whole, train(lambda: Dropping(fused=False), word, 4, resumed=path, seed=1)


def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    """Also where its script sets another seed."""
    for whole, rest in run_ranks(resumed, 4, "tp2_dp2_zero1_mb2", tmp_path):
        assert {step for _, step in rest.masks} == {2, 3}
        assert rest.masks == {place: calls for place, calls in whole.masks.items() if place[1] >= 2}
        assert rest.losses == whole.losses[2:]


# ---------------------------------------------------------------------- generators


def drawn() -> tuple[float, float, float]:
    """A number from every default generator."""
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_streams_of_all_generators_follow_from_the_coordinates_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    seen: dict[tuple[int, int, int, int], list[tuple[float, ...]]] = {}
    for replica, stage in ((0, 0), (0, 1), (1, 0), (1, 1)):
        streams = MicrobatchStreams(7, replica, CPU)
        for step in (1, 2):
            with streams.step():
                for microbatch in (0, 1) if stage else (1, 0):  # the order of the schedule
                    streams.begin(microbatch)
                    seen.setdefault((replica, step, microbatch, 0), []).append(drawn())
                    for _ in range(stage):  # blocks of one stage draw, those of another do not
                        streams.enter_stage(microbatch, stage)
                        seen.setdefault((replica, step, microbatch, stage), []).append(drawn())
    assert all(len(set(draws)) == 1 for draws in seen.values())
    assert [len(set(numbers)) for numbers in zip(*(draws[0] for draws in seen.values()), strict=True)] == [len(seen)] * 3
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]  # type: ignore[index]


class PhiloxGenerator:
    """What `sharded_stream` uses of a CUDA generator."""

    def __init__(self, seed: int, offset: int) -> None:
        self.seed, self.offset, self.seeds = seed, offset, [seed]

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def manual_seed(self, seed: int) -> None:
        self.seed, self.offset = seed, 0
        self.seeds.append(seed)

    def set_offset(self, offset: int) -> None:
        self.offset = offset


def test_every_part_of_every_draw_on_a_gpu_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, nobody = set(), cast(dist.ProcessGroup, None)
    for coordinate, offset in product(range(16), range(0, 64, 4)):
        generator = PhiloxGenerator(5, offset)
        monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
        with sharded_stream(GroupAxis("tp", nobody, list(range(16)), coordinate), torch.device("cuda", 0)):
            inner.add(generator.initial_seed())
        assert (generator.seed, generator.offset) == (5, offset + 4)  # where it would be after one draw, on every rank
    assert len(inner) == 16 * 16


# ---------------------------------------------------------------------- initial weights


class MadeLate(Dropping):
    """Draws the weights of its blocks in the hook for it."""

    def __init__(self) -> None:
        super().__init__(fused=True, depth=0)

    def configure_model(self) -> None:
        if not self.blocks:
            self.blocks.extend(DroppingBlock(fused=True) for _ in range(2))


class Shards(pl.Callback):
    """Copies what a rank holds before the first step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(trainer.strategy, HybridParallelStrategy)
        specs = {name: get_spec(p) for name, p in pl_module.named_parameters()}
        held = {name: value.detach().clone().numpy() for name, value in trainer.strategy.states.full_parameters()}
        self.held = {name: (specs[name], value) for name, value in held.items()}


def initial(rank: int, world_size: int, words: list[str], makers: dict[str, MakeModel]) -> dict[tuple[str, str], Any]:
    """What this rank holds before the first step. Only the first rank's script has the seed of the run."""
    found = {}
    for word, (name, make) in product(words, makers.items()):
        shards = Shards()
        train(make, word, 1, shards, seed=3 if rank == 0 else 100 + rank)
        found[word, name] = shards.held
    return found


def check_initial(word: str, ranks: list[dict[str, Any]], expected: dict[str, torch.Tensor]) -> None:
    """Put the parts of all ranks together and compare them, to the last bit, with the weights of one process."""
    layout = parse_layout(word)
    covered = set()
    for rank, held in enumerate(ranks):
        for name, (spec, value) in held.items():
            whole = expected[name]
            own = whole if spec.split is None else spec.split.shard(whole, layout.tp, layout.coordinate_of(rank).tp)
            np.testing.assert_array_equal(value, own.numpy(), err_msg=f"{name} in {word} on rank {rank}")
            covered.add(spec.name)
    assert covered == expected.keys()


@pytest.mark.parametrize(
    "words", [["tp2", "pp2", "dp2_zero1", "dp2_zero3"], ["tp2_pp2", "pp2_dp2_zero2"]], ids=["2 ranks", "4 ranks"]
)
def test_initial_weights_are_those_of_one_process(words: list[str]) -> None:
    makers: dict[str, MakeModel] = {"in the constructor": lambda: Dropping(fused=False), "in the hook for it": MadeLate}
    ranks = run_ranks(initial, parse_layout(words[0]).world_size, words, makers)
    for name, make in makers.items():
        torch.manual_seed(3)
        module = make()
        module.configure_model()
        expected = {name: p.detach() for name, p in module.named_parameters()}
        for word in words:
            check_initial(word, [held[word, name] for held in ranks], expected)
