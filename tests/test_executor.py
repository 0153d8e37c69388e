"""The engine of a pipeline in motion, against the same step in one process."""

from __future__ import annotations

import time
from collections import deque
from datetime import timedelta
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_par.engine import METERED_STEPS, Engine
from lightning_par.errors import ModelError
from lightning_par.host.batch import split_batch
from lightning_par.install import install
from lightning_par.layout import parse_layout
from lightning_par.pipeline.action import Action
from lightning_par.pipeline.arrival import Arrival
from lightning_par.pipeline.executor import Executor, _Step
from lightning_par.pipeline.stage import StageProgram
from lightning_par.pipeline.transport import Transport
from lightning_par.runtime.axis import LocalAxis
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.parameter import get_spec
from tests.axes import CountingAxis
from tests.models import llama, make_batch
from tests.planning import Chain, plan_of, tokens
from tests.ranks import run_ranks

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Model(Chain):
    """Tied weights, a loss for every sample."""

    def __init__(self) -> None:
        super().__init__(Block, depth=4)
        self.head.weight = self.embedding.weight
        self.dropout = nn.Dropout(0.0)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(batch["tokens"]).square().mean()


class Checkpointed(Model):
    """Blocks computed again in the backward, by one of the two ways of torch, dropout included."""

    reentrant = False

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(lambda x, block=block: self.dropout(block(x)), x, use_reentrant=self.reentrant)
        logits: torch.Tensor = self.head(x)
        return logits


class Reentrant(Checkpointed):
    reentrant = True


def build(cls: type[Model] = Model) -> Model:
    torch.manual_seed(0)
    return cls()


def engine_of(module: pl.LightningModule, world_size: int, word: str, schedule: str = "1f1b", batch: Any = None) -> Engine:
    layout = parse_layout(word).resolve(world_size)
    plan = plan_of(module, word, batch)
    engine = Engine(module, plan, Mesh(layout, timedelta(seconds=30)), torch.device("cpu"), schedule)
    engine.own_states([torch.optim.SGD(module.parameters(), lr=0.1)])
    return engine


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    held = engine.module.named_parameters()
    return {get_spec(p).name: p.grad.clone() for _, p in held if p.grad is not None}


def train(engine: Engine, batch: dict[str, torch.Tensor], microbatches: int = 4) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One step from zero gradients: the losses (last stage) and the gradients of what this rank holds."""
    engine.module.zero_grad()
    pieces = split_batch(batch, microbatches)
    weights = [size / len(batch["tokens"]) for _, size in pieces]
    step: Any = engine.module.training_step
    outputs = engine.train(lambda index: step(pieces[index][0], 0), weights, lambda loss: loss)
    return [float(loss) for loss in outputs], gradients(engine)


def alone(module: Model, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    module.zero_grad()
    loss = module.training_step(batch, 0)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tied: dict[str, torch.Tensor] | None = None) -> None:
    for name, grad in ours.items():
        wanted = theirs[name] if tied is None or name not in tied else tied[name]
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def summed(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tied gradient over both stages that hold it."""
    total = grads["embedding.weight"].clone()
    dist.all_reduce(total)
    return {**grads, "embedding.weight": total}


# ---------------------------------------------------------------------- two stages


def two_stages(rank: int, world_size: int) -> None:
    schedules = {name: engine_of(build(), world_size, "pp2", name) for name in ("1f1b", "gpipe")}
    results = {name: train(engine, tokens(8)) for name, engine in schedules.items()}
    assert results["1f1b"][0] == results["gpipe"][0]
    for name, grad in results["1f1b"][1].items():
        assert torch.equal(grad, results["gpipe"][1][name]), name

    engine, whole = schedules["1f1b"], build()
    for batch, microbatches in (
        (tokens(8), 4),
        (tokens(7), 4),  # 2, 2, 2, 1
        (tokens(3), 4),  # fewer samples than microbatches
        (tokens(8, length=3), 4),  # a shorter sequence than before
        (tokens(8, length=9), 2),
    ):
        losses, grads = train(engine, batch, microbatches)
        loss, expected = alone(whole, batch)
        close(summed(grads), expected)
        pieces = [size for _, size in split_batch(batch, microbatches)]
        if losses:
            mean = sum(value * size for value, size in zip(losses, pieces, strict=True)) / sum(pieces)
            assert abs(mean - loss) < 1e-6 * loss
    lengths_change(engine, whole)


def lengths_change(engine: Engine, whole: Model) -> None:
    """Microbatches of one step, each of its own length."""
    batches = [tokens(2, length) for length in (3, 6, 4)]
    engine.module.zero_grad()
    losses = engine.train(lambda index: engine.module.training_step(batches[index], 0), [1 / 3] * 3, lambda loss: loss)  # type: ignore[operator]
    assert not any(loss.requires_grad for loss in losses)  # a graph would keep what was received
    whole.zero_grad()
    sum(whole.training_step(batch, 0) for batch in batches).div(3).backward()  # type: ignore[union-attr]
    close(summed(gradients(engine)), {name: p.grad for name, p in whole.named_parameters() if p.grad is not None})


def test_two_stages_equal_one_process() -> None:
    run_ranks(two_stages, 2)


def recomputed(rank: int, world_size: int) -> None:
    for dropout in (0.0, 0.5):
        results = []
        for cls in (Model, Checkpointed, Reentrant):
            module = build(cls)
            module.dropout.p = dropout
            if cls is Model:  # the same code without the checkpoint
                module.blocks = nn.ModuleList([nn.Sequential(block, module.dropout) for block in module.blocks])
            results.append(summed(train(engine_of(module, world_size, "pp2"), tokens(8))[1]))
        for other in results[2:]:
            for name, grad in results[1].items():
                torch.testing.assert_close(grad, other[name], msg=f"{name} with dropout {dropout}")
        if dropout == 0.0:
            close(results[1], alone(build(), tokens(8))[1])


def test_blocks_that_the_backward_computes_again() -> None:
    run_ranks(recomputed, 2)


def frozen(rank: int, world_size: int) -> None:
    def freeze(module: Model) -> Model:
        for part in (module.embedding, module.blocks[0], module.blocks[1]):
            part.requires_grad_(False)
        return module

    _, grads = train(engine_of(freeze(build()), world_size, "pp2"), tokens(8))
    _, expected = alone(freeze(build()), tokens(8))
    assert set(grads) == (set() if rank == 0 else set(expected))
    close(grads, expected)


def left_early(rank: int, world_size: int) -> str:
    class Early(Model):
        returns = False

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            if self.returns:
                return torch.zeros((), requires_grad=True)
            return super().training_step(batch, batch_idx)

    module = build(Early)
    engine = engine_of(module, world_size, "pp2")
    module.returns = True
    try:
        train(engine, tokens(8))
    except ModelError as error:
        return str(error)
    return "nothing"


def odd_cases(rank: int, world_size: int) -> str:
    frozen(rank, world_size)
    return left_early(rank, world_size)


def test_a_frozen_first_stage_and_a_step_that_ends_early() -> None:
    first, last = run_ranks(odd_cases, 2)
    for message in (first, last):
        assert "microbatch 0 ended before it reached the blocks of stage 1: every step of a pipeline runs all blocks" in message


class Cropped(Model):
    """Crops by a number that is none of the batch's shapes."""

    length = 6

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return super().training_step({"tokens": batch["tokens"][:, : self.length]}, batch_idx)


class Twice(Model):
    """Runs its blocks twice where it is not trained."""

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self(batch["tokens"])
        return self.training_step(batch, batch_idx)


def early_receives(rank: int, world_size: int) -> tuple[int, str, str]:
    """How many receives were begun early; what is said of shapes that change without the batch; of blocks that run twice."""
    module = build(Cropped)
    engine, posted = engine_of(module, world_size, "pp2"), []
    post = Transport.post

    def watched(self: Transport, message: Action, likes: Any) -> None:
        posted.append(message)
        post(self, message, likes)

    Transport.post = watched  # type: ignore[method-assign]
    early = []

    def step(index: int) -> torch.Tensor:
        early.append(len(posted) > index if rank else False)
        return module.training_step(tokens(2), 0)

    for _ in range(2):
        early.clear()
        posted.clear()
        engine.train(step, [0.25] * 4, lambda loss: loss, [("train", 2, 6)] * 4)
    Transport.post = post  # type: ignore[method-assign]
    Cropped.length = 4
    said = ["nothing", "nothing"]
    try:
        if rank == 0:
            engine.train(lambda index: module.training_step(tokens(2), 0), [1.0], lambda loss: loss, [("train", 2, 6)])
    except ModelError as error:
        said[0] = str(error)
    dist.barrier()
    if rank == 1:  # alone: the first stage's step ends before
        twice = build(Twice)
        other = StageProgram(twice, plan_of(twice, "pp2"), [1])
        received = lambda held: [torch.ones_like(tensor) for tensor in held]  # noqa: E731
        try:
            with torch.no_grad():
                other.run(1, lambda: twice.validation_step(tokens(2), 0), received, Arrival())
        except ModelError as error:
            said[1] = str(error)
    return sum(early), said[0], said[1]


def test_receives_begin_early_where_shapes_follow_from_the_batch() -> None:
    (_, changed, _), (early, _, again) = run_ranks(early_receives, 2)
    assert early == 4
    assert (
        "stage 0 passes on tensors of shape [2, 4, 16] for microbatch 0, and passed on [2, 6, 16] before, for a microbatch of the "
        "same shapes: let all shapes in a step follow from those of its batch, so crop and pad in the dataset"
    ) in changed
    assert again.startswith("the step calls the blocks of stage 1 a second time (model.generate does, for each token)")


class Noted:
    """A transport that notes the receives that are begun."""

    def __init__(self) -> None:
        self.posted: list[Action] = []

    def is_remote(self, message: Action) -> bool:
        return True

    def post(self, message: Action, likes: Any) -> None:
        self.posted.append(message)


def test_no_receive_overtakes_another_whose_shape_is_not_known() -> None:
    module, transport = build(), Noted()
    executor = Executor(StageProgram(module, plan_of(module, "pp2"), [1]), transport)  # type: ignore[arg-type]
    step = _Step(lambda index: None, lambda loss: loss, [1.0] * 3, ["short", "long", "short"])
    executor._known[step.key(1, 0)] = [((2, 6, 16), torch.float32)]
    step.unposted = (deque(enumerate(Action("F", 1, index) for index in range(3))),)
    executor._post_ahead(step)
    assert transport.posted == [Action("F", 1, 0)]  # over NCCL the third would be given what the second was sent


def test_receives_begin_several_at_once() -> None:
    transport = Noted()
    executor = Executor(StageProgram(build(), plan_of(build(), "pp2"), [1]), transport)  # type: ignore[arg-type]
    step = _Step(lambda index: None, lambda loss: loss, [1.0] * 20, ["equal"] * 20)
    executor._known[step.key(1, 0)] = [((2, 6, 16), torch.float32)]
    step.unposted = (deque(enumerate(Action("F", 1, index) for index in range(20))),)
    begun = []
    for taken in range(20):
        step.num_taken = taken
        executor._post_ahead(step)
        begun.append(len(transport.posted))
    assert begun == [8] * 5 + [13] * 5 + [18] * 5 + [20] * 5
    assert transport.posted == [Action("F", 1, index) for index in range(20)]


def measured(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    """Forward costs of both stages before and after some steps under ``auto``; the second has blocks that sleep."""
    module = build()
    for block in list(module.blocks)[2:]:
        block.register_forward_pre_hook(lambda block, args: time.sleep(0.01))
    engine = engine_of(module, world_size, "pp2", "auto")
    before = list(engine.tables.costs.forward)
    for _ in METERED_STEPS[-1] * [None]:
        _, grads = train(engine, tokens(8))
    close(summed(grads), alone(build(), tokens(8))[1])
    return before, list(engine.tables.costs.forward)


@pytest.mark.alone
def test_a_schedule_from_costs_measures_them() -> None:
    (before, after), (other_before, other_after) = run_ranks(measured, 2)
    assert before == other_before and after == other_after  # bit for bit: both ranks build the same tables
    assert before[0] < 2 * before[1] and after[1] > 0.02 > after[0]


# ---------------------------------------------------------------------- four stages


def a_rank_fails(rank: int, world_size: int) -> tuple[str, float]:
    module = build()
    engine = engine_of(module, world_size, "pp4")
    _, grads = train(engine, tokens(8), 8)
    total = grads.get("embedding.weight", torch.zeros(24, WIDTH))
    dist.all_reduce(total)
    _, expected = alone(build(), tokens(8))
    close(grads, expected, {"embedding.weight": grads.get("embedding.weight", total)})
    torch.testing.assert_close(total, expected["embedding.weight"])

    calls = 0

    def program(index: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if rank == 2 and calls == 3:
            raise ValueError("boom")
        return module.training_step(tokens(2), 0)

    start = time.monotonic()
    try:
        engine.train(program, [1 / 8] * 8, lambda loss: loss)
    except ValueError as error:
        return str(error), 0.0
    except RuntimeError as error:
        return type(error).__name__, time.monotonic() - start
    return "nothing", 0.0


def test_four_stages_and_a_rank_that_fails() -> None:
    results = run_ranks(a_rank_fails, 4)
    assert results[2][0] == "boom"
    for rank in (1, 3):  # its neighbours see that it is gone
        kind, seconds = results[rank]
        assert kind not in ("nothing", "boom") and seconds < 10, results


# ---------------------------------------------------------------------- collectives


def counted(rank: int, world_size: int) -> list[tuple[int, int]]:
    """All-reduces of a forward and of a backward, with 1 and with 3 decoder layers."""
    counts = []
    for depth in (1, 3):
        torch.manual_seed(0)
        module: Any = llama()
        module.model.model.layers = module.model.model.layers[:depth]
        batch, axis = make_batch(0, 4), CountingAxis()
        install(module, plan_of(module, "tp2", batch, {"chain": "model.model.layers"}), 0, axis, torch.device("cpu"))
        loss = module.training_step(batch, 0)
        forward = axis.calls["all_reduce"]
        loss.backward()
        assert axis.calls["all_gather"] == 0 and not axis.gathers
        counts.append((forward, axis.calls["all_reduce"] - forward))
    return counts


def test_four_all_reduces_for_each_decoder_layer() -> None:
    for (forward_1, backward_1), (forward_3, backward_3) in run_ranks(counted, 2):
        assert (forward_3 - forward_1, backward_3 - backward_1) == (2 * 2, 2 * 2)  # two more layers, two each way


def test_one_stage_needs_no_ranks() -> None:
    module = build()
    stages = install(module, plan_of(module, "single"), 0, LocalAxis("tp", 1, 0), torch.device("cpu"))
    loss, left = stages.run(0, lambda: module.training_step(tokens(), 0), None, Arrival())
    assert left == [] and torch.equal(loss, build().training_step(tokens(), 0))
