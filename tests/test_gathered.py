"""Weights that ZeRO-3 gathers: in one process what autograd saves of them, and on real ranks how many there are when."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel  # noqa: F401  # before the fork

from benchmarks.counting import settled
from benchmarks.storage import GATHERS, LivingParameters
from lightning_par.engine import Engine
from lightning_par.host.batch import split_batch
from lightning_par.host.loss import loss_of
from lightning_par.layout import parse_layout
from lightning_par.memory.optimizer import GroupForm, OptimizerForm
from lightning_par.memory.states import state_bytes
from lightning_par.offload import _Offload
from lightning_par.pipeline.action import Action
from lightning_par.prepare import prepare_plan
from lightning_par.private.deepspeed.gathered import GatheredWeights
from lightning_par.private.deepspeed.mark import Marks, remember_parameters
from lightning_par.private.saved import saving
from lightning_par.private.torch import StorageWeakRef
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.nested import tensors_in
from tests.models import adamw, gpt, gpt2, make_batch
from tests.parity import check_parity
from tests.ranks import run_ranks

SLOW = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("pytorch_lightning", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


# ---------------------------------------------------------------------- real ranks


@dataclass
class Seen:
    """What a rank saw in a step.

    Attributes:
        left: bytes of gathered weights that are there after each action.
        most: the most at once, in each action.
        gathers: collectives that gather them.
        expected: the most that there are, by the forecast.
    """

    left: dict[str, int]
    most: dict[str, int]
    gathers: int
    expected: int


class Watching(LivingParameters):
    """A `LivingParameters` that is an observer of the actions, and counts what gathers."""

    def __init__(self, engine: Engine, batch: Any) -> None:
        before = [*engine.module.parameters(), *engine.module.buffers(), *tensors_in(batch)]
        super().__init__(before, engine.mesh.dp.group.group_name)
        self.action, self.seen = "", Seen({}, {}, 0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.gathers += func in GATHERS
        return super().__torch_dispatch__(func, types, args, kwargs)

    def begin(self, action: Action) -> None:
        self.action, self.most_gathered = str(action), 0

    def wait(self) -> None:
        """Waiting gathers nothing."""

    def arrive(self) -> None:
        """Nor does what arrives."""

    def end(self) -> None:
        self.seen.left[self.action], self.seen.most[self.action] = (
            settled(lambda: sum(self.gathered().values())),
            self.most_gathered,
        )


def watch_step(rank: int, world_size: int, word: str, make: Any, choices: list[dict[str, Any]]) -> list[Seen]:
    """Two steps of each choice of plan; what the second one saw."""
    warnings.simplefilter("ignore")  # a log without a Trainer
    return [watch_one(rank, world_size, word, make, choice) for choice in choices]


def watch_one(rank: int, world_size: int, word: str, make: Any, choice: dict[str, Any]) -> Seen:
    torch.manual_seed(0)
    module, batch, layout = make(), make_batch(0, 8), parse_layout(word).resolve(world_size)
    plan = prepare_plan(module, batch, layout, choice)
    pieces = split_batch(batch, plan.layout.microbatches or 1)
    names = frozenset(name for name, _ in module.named_parameters())
    form = OptimizerForm((GroupForm(names, 8, 4),))
    engine = Engine(module, plan, Mesh(layout, timedelta(seconds=60)), CPU)
    states = engine.own_states([torch.optim.AdamW(module.parameters())])
    step: Any = module.training_step
    let_gloo_drop_what_has_arrived(states.engine.ahead)
    for _ in range(2):
        watching = Watching(engine, batch)
        engine.observers.append(watching)
        with watching:
            engine.train(lambda index: step(pieces[index][0], 0), [size / 8 for _, size in pieces], loss_of)
        engine.observers.remove(watching)
        states.reduce()
        states.step()
        states.zero_grad()
    states.close()
    watching.seen.expected = state_bytes(plan, layout.coordinate_of(rank).pp, form).gathered
    return watching.seen


def let_gloo_drop_what_has_arrived(ahead: Any) -> None:
    """Its thread holds a collective's tensors for a moment after it; the next unit is not gathered before it has let go."""
    go_ahead = ahead._go_ahead

    def wait_and_go_ahead(unit: nn.Module, forward: bool) -> None:
        time.sleep(0.01)
        go_ahead(unit, forward)

    ahead._go_ahead = wait_and_go_ahead


CHOICES: list[dict[str, Any]] = [{}, {"recompute": {"*": "full"}}, {"offload_activations": {"*": True}}]


@pytest.mark.parametrize("word", ["dp2_zero3_mb2", "pp2_dp2_zero3_mb4"])
def test_after_a_forward_no_gathered_weight_is_left(word: str) -> None:
    """A block is whole while it runs, forward and backward, and nothing else; two gathers of each module for each microbatch."""
    layout = parse_layout(word)
    for rank, ranks in enumerate(run_ranks(watch_step, layout.world_size, word, gpt, CHOICES)):
        for seen in ranks:
            assert len(seen.left) == 2 * (layout.microbatches or 1)
            assert not any(seen.left.values()), seen
            assert set(seen.most.values()) == {seen.expected}
            others = 3 if layout.pp == 1 else [1, 2][layout.coordinate_of(rank).pp]  # the embedding; the last norm, the head
            assert seen.gathers == 2 * (layout.microbatches or 1) * (4 // layout.pp + others)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["dp2_zero3_mb2", "tp2_dp2_zero3", "pp2_dp2_zero3_mb4"])
def test_after_a_forward_no_gathered_weight_is_left_of_a_tied_model(word: str) -> None:
    for ranks in run_ranks(watch_step, parse_layout(word).world_size, word, gpt2, CHOICES):
        assert not any(size for seen in ranks for size in seen.left.values()), ranks


class Borrower(nn.Module):
    """Its head is the embedding's weight, which it reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = gpt().network
        self.body.head = nn.Identity()
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(self.body(tokens) * self.scale, self.body.embedding.weight)


class Borrowing(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = Borrower()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        tokens = batch["tokens"]
        return F.cross_entropy(self.network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


@pytest.mark.slow
def test_after_a_forward_no_borrowed_weight_is_left() -> None:
    for (seen,) in run_ranks(watch_step, 2, "dp2_zero3_mb2", Borrowing, [{}]):
        assert not any(seen.left.values()), seen


@pytest.mark.parametrize(
    "word", ["dp2_zero3", pytest.param("pp2_dp2_zero3", marks=SLOW), pytest.param("tp2_dp2_zero3", marks=SLOW)]
)
def test_parity(word: str) -> None:
    """A tied weight, recomputation, and activations that wait on the host, in every pair; and a borrowed weight."""
    makers = {f"{make.__name__} {mode} {off}": make for make in (gpt, gpt2) for mode in ("none", "full") for off in (False, True)}
    options = {name: {"recompute": name.split()[1], "offload_activations": name.endswith("True")} for name in makers}
    check_parity({**makers, "borrowing": Borrowing}, word, timeout=300, options=options)


# ---------------------------------------------------------------------- one process


class Stand:
    """One weight as DeepSpeed would have it: whole, or away with other numbers where it was."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        self.values = torch.randn(*shape, dtype=dtype)
        self.parameter: Any = nn.Parameter(self.values.clone())
        self.parameter.ds_active_sub_modules, self.parameter.partition = set(), self.release
        self.parameter.all_gather, self.num_gathers = self.gather, 0
        self.parameter.ds_status = SimpleNamespace(name="AVAILABLE")
        coordinator = SimpleNamespace(fetch_sub_module=lambda module, forward: None)
        self.weights = GatheredWeights(coordinator, lambda module: [self.parameter], lambda parameter: self.gather())
        coordinator.fetch_sub_module(nn.Identity(), forward=True)

    def gather(self) -> None:
        self.parameter.data = torch.cat([self.values.new_zeros(3), self.values.flatten()])[3:].view_as(self.values)
        self.parameter.ds_status = SimpleNamespace(name="AVAILABLE")
        self.num_gathers += 1

    def release(self) -> None:
        self.parameter.data.fill_(torch.nan)
        self.parameter.data = self.values.new_empty(0)
        self.parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")


OPERATIONS: dict[str, Any] = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: x @ w.t(),
    "part": lambda x, w: F.linear(x, w[2:4]) + x @ w.t()[:, 1:3],
    "chunks": lambda x, w: sum(x @ part.t() for part in w.chunk(3)),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "convolution": lambda x, w: F.conv1d(x.unsqueeze(-1), w.unsqueeze(-1)),
    "product": lambda x, w: x * w.detach()[0] + x * w[1],
    "detached": lambda x, w: x @ w.data.t(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_operation_saves_a_note_of_the_weight(name: str) -> None:
    x, stand = torch.randn(2, 4, dtype=torch.float64, requires_grad=True), Stand(6, 4)
    expected = torch.autograd.grad(OPERATIONS[name](x, stand.parameter).square().sum(), x)
    with stand.weights.saving():
        loss = OPERATIONS[name](x, stand.parameter).square().sum()
    storage = StorageWeakRef(stand.parameter.untyped_storage())
    stand.weights.forget()
    stand.release()
    assert storage.expired(), "something holds the weight"
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected[0])
    assert stand.num_gathers == 1
    stand.weights.release()
    assert stand.parameter.ds_status.name == "NOT_AVAILABLE"


def test_a_weight_that_is_being_gathered_is_waited_for() -> None:
    x, stand = torch.randn(2, 4, dtype=torch.float64, requires_grad=True), Stand(6, 4)
    expected = torch.autograd.grad(F.linear(x, stand.parameter).sum(), x)
    with stand.weights.saving():
        loss = F.linear(x, stand.parameter).sum()
    stand.weights.forget()
    stand.release()
    stand.parameter.ds_status = SimpleNamespace(name="INFLIGHT")
    stand.parameter.all_gather = lambda: pytest.fail("it is on its way")
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected[0])
    stand.weights.release()
    assert stand.parameter.ds_status.name == "NOT_AVAILABLE"


class Casts(TorchDispatchMode):
    """The storages of what is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and made.dtype is torch.bfloat16 and made.numel() == 24:
            self.storages.append(StorageWeakRef(made.untyped_storage()))
        return made


@pytest.mark.parametrize(("name", "num_kept", "num_gathers"), [("linear", 0, 1), ("chain", 1, 1), ("convolution", 1, 0)])
def test_what_autocast_casts_is_cast_again(name: str, num_kept: int, num_gathers: int) -> None:
    """The cast of a view of a weight is kept."""
    operations = {**OPERATIONS, "chain": lambda x, w: F.linear(F.linear(x, w), w.t()) + x}
    x, stand = torch.randn(2, 4, requires_grad=True), Stand(6, 4, dtype=torch.float32)

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss: torch.Tensor = operations[name](x, stand.parameter).float().square().sum()
        return loss

    expected = torch.autograd.grad(run(), [x, stand.parameter])
    with stand.weights.saving(), Casts() as casts:
        loss = run()
    assert casts.storages and sum(not storage.expired() for storage in casts.storages) == num_kept
    stand.release()
    for ours, theirs in zip(torch.autograd.grad(loss, [x, stand.parameter]), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert stand.num_gathers == num_gathers


def test_a_weight_that_is_whole_again_is_not_gathered_nor_released() -> None:
    x, stand = torch.randn(2, 4, dtype=torch.float64, requires_grad=True), Stand(6, 4)
    with stand.weights.saving():
        loss = F.linear(x, stand.parameter).sum()
    stand.release()
    stand.gather()
    loss.backward()
    stand.weights.release()
    assert (stand.num_gathers, stand.parameter.ds_status.name) == (1, "AVAILABLE")


def test_a_copy_and_a_view_as_another_dtype_are_saved_as_they_are() -> None:
    x, stand = torch.randn(2, 4, dtype=torch.float64, requires_grad=True), Stand(6, 4)
    with stand.weights.saving():
        (x * stand.parameter.detach().clone()[0] + x * stand.parameter.detach().view(torch.int64)[0]).sum().backward()
    assert stand.num_gathers == 0


def test_activations_go_to_the_host_and_weights_nowhere() -> None:
    """The hooks of offload.py lie inside those of the weights, which get what these leave alone."""
    stand, x = Stand(6, 4), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(4, 6, bias=False, dtype=torch.float64)
    layer.weight = stand.parameter
    expected = torch.autograd.grad(layer(x).sigmoid().sum(), x)
    with stand.weights.saving(), _Offload(layer, None).hooks:
        loss = layer(x).sigmoid().sum()
    storage = StorageWeakRef(stand.parameter.untyped_storage())
    stand.release()
    assert storage.expired()
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected[0])


# ---------------------------------------------------------------------- hooks inside hooks


def test_what_inner_hooks_leave_alone_goes_to_the_outer_ones() -> None:
    x, seen = torch.randn(3, requires_grad=True), list[int]()
    outer = saved_tensors_hooks(lambda tensor: seen.append(tensor.numel()) or tensor.detach(), lambda tensor: 2 * tensor)  # type: ignore[func-returns-value]
    with outer, saving(lambda tensor: None):
        y = x.exp()
    y.sum().backward()
    assert seen == [3]
    assert torch.equal(x.grad, 2 * y.detach())


def test_a_change_in_place_is_noticed_as_without_hooks() -> None:
    x = torch.randn(3, requires_grad=True)
    for context in (nullcontext(), saving(lambda tensor: None)):
        with context:
            y = x.exp()
        y.add_(1)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .* is at version 1; expected version 0"):
            y.sum().backward()


def test_the_graph_of_a_saved_result_does_not_hold_itself() -> None:
    with saving(lambda tensor: None):
        y = torch.randn(3, requires_grad=True).exp()
    storage = StorageWeakRef(y.untyped_storage())
    del y
    assert storage.expired()


# ---------------------------------------------------------------------- parameters by name


def test_a_unit_answers_from_a_list_and_a_copy_of_it_for_itself() -> None:
    unit, outer = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), nn.Module()
    outer.add_module("unit", unit)
    names = [name for name, _ in unit.named_parameters()]
    marks = Marks(outer)
    remember_parameters(unit)
    marks.find()
    assert [name for name, _ in unit.named_parameters()] == names and "named_parameters" in vars(unit)
    assert [name for name, _ in unit.named_parameters(prefix="a", recurse=True)] == [f"a.{name}" for name in names]
    assert list(unit.named_parameters(recurse=False)) == []
    assert [id(p) for p in outer.parameters()] == [id(p) for p in unit.parameters()]
    copied = copy.deepcopy(unit)
    assert [name for name, _ in copied.named_parameters()] == names
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in unit.parameters()}
    marks.remove()
    assert "named_parameters" not in vars(unit)
