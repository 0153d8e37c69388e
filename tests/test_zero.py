"""Every ZeRO stage under every mesh trains as one process does: losses, each gradient, norm, weights after several steps."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_par.errors import CheckpointError, ConfigurationError
from lightning_par.gradients import clip_by_norm, clip_by_value, global_norm, sum_shared_gradients
from lightning_par.private.deepspeed import DEEPSPEED_VERSION, check_deepspeed
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.parameter import ParameterSpec, Split, set_spec
from lightning_par.tensor.linear import convert_linear
from lightning_par.zero import config
from lightning_par.zero.bucket import set_gradient
from lightning_par.zero.partitioned import DeepSpeedStates
from lightning_par.zero.replicated import ReplicatedStates
from lightning_par.zero.states import OptimizerStates
from tests import zero_model
from tests.ranks import run_ranks
from tests.zero_model import Case, KeptStates, Model

# before the fork: else each rank spends seconds on it; DeepSpeed imports the second one when an engine starts
PRELOADED = [importlib.import_module(name) for name in ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")]
NUM_STEPS = 3


class Run:
    """One rank's model, optimizer states and learning-rate schedule."""

    def __init__(self, case: Case, mesh: Mesh) -> None:
        self.case, self.mesh = case, mesh
        self.sent: list[object] = []  # a tensor must live until it is sent
        self.model = Model(case, mesh.coordinate.pp, mesh.tp)
        self.start()

    def start(self) -> None:
        case, mesh, optimizer = self.case, self.mesh, zero_model.build_optimizer(self.model, self.case.optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.states: OptimizerStates = (
            DeepSpeedStates(self.model, [optimizer], case.zero, mesh, case.options)
            if case.zero
            else ReplicatedStates(self.model, [optimizer], mesh.dp)
        )

    def accumulate(self, step: int) -> float:
        """All forwards, then all backwards, of each batch. Returns this replica's loss, on the last stage."""
        total = 0.0
        for batch in zero_model.microbatches(self.case, step, self.mesh.dp.coordinate):
            with self.states.accumulate():
                pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
                for kind, index in self.case.actions(self.mesh.coordinate.pp):
                    if kind == "F":
                        pairs.append(self._forward(*batch[index]))
                    else:
                        self._backward(*pairs[index])
            total += sum(float(output.detach().sum()) for _, output in pairs)
        return total

    def evaluate(self, step: int) -> float:
        """The loss that `accumulate` has with the same weights, without gradients."""
        total = 0.0
        for batch in zero_model.microbatches(self.case, step, self.mesh.dp.coordinate):
            with torch.no_grad(), self.states.evaluate():
                total += sum(float(self._forward(*pair)[1].sum()) for pair in batch)
        assert self.case.zero < 3 or not any(p.numel() for p in self.model.parameters()), "parameters stay gathered"
        return total

    def reduce(self) -> torch.Tensor:
        """Every sum and the clip. Returns the norm before it."""
        sum_shared_gradients(self.model.parameters(), self.mesh)
        self.states.reduce()
        norm = global_norm(self.states, self.mesh)
        if self.case.max_norm is not None:
            clip_by_norm(self.states, self.case.max_norm, norm)
        if self.case.max_value is not None:
            clip_by_value(self.states, self.case.max_value)
        return norm

    def step(self) -> None:
        self.states.step()
        self.states.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the scheduler warns where it believes that no step was made
            self.schedule.step()

    def train(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.accumulate(step)
            self.reduce()
            self.step()

    def _forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = zero_model.receive(tokens, self.mesh, step=-1)
        if not self.mesh.is_first_stage:
            hidden.requires_grad_(torch.is_grad_enabled())
        output = zero_model.run_stage(self.model, hidden)
        self.states.after_forward()
        if self.mesh.is_last_stage:
            return hidden, zero_model.loss_of(self.case, output, targets)
        self.sent.append(zero_model.send(output, self.mesh, step=1))
        return hidden, output

    def _backward(self, hidden: torch.Tensor, output: torch.Tensor) -> None:
        torch.autograd.backward(output, zero_model.receive(None, self.mesh, step=1))
        self.states.after_backward()
        self.sent.append(zero_model.send(hidden.grad, self.mesh, step=-1))


@contextmanager
def running(case: Case) -> Iterator[Run]:
    """Build, and close: afterwards nothing may keep the model alive, nor DeepSpeed's hooks the next case."""
    gc.freeze()  # what the parent imported need not be searched by every collection
    run = Run(case, zero_model.build_mesh(case))
    yield run
    run.states.close()
    model = weakref.ref(run.model)
    vars(run).clear()
    gc.collect()
    assert model() is None, "something keeps the model alive after close()"


def gathered_gradients(run: Run) -> dict[str, torch.Tensor]:
    """Every gradient of this rank's parameters, flat, put together from the fragments of all dp ranks in order."""
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    mine = {names[piece.parameter]: piece.gradient.flatten().clone() for piece in run.states.gradients() if piece.is_counted}
    parts = [mine] * run.mesh.dp.size
    dist.all_gather_object(parts, mine, group=run.mesh.dp.group)
    return {
        name: torch.cat([part[name] for part in parts if name in part])
        for name in names.values()
        if any(name in part for part in parts)
    }


def check_parity(run: Run) -> None:
    """Compare each step with the same training in one process."""
    mesh, replicas = run.mesh, run.mesh.dp.size
    alone = zero_model.train_alone(run.case, NUM_STEPS)
    for step, (reference, loss, norm) in zip(range(NUM_STEPS), alone, strict=False):
        losses = torch.tensor([run.evaluate(step), run.accumulate(step), run.evaluate(step)])
        mesh.dp.all_reduce(losses)
        if mesh.is_last_stage:
            torch.testing.assert_close(losses / replicas, torch.full((3,), loss), rtol=1e-5, atol=0)
        torch.testing.assert_close(run.reduce().item(), norm, rtol=2e-5, atol=0)
        expected = dict(reference.named_parameters())
        gradients = gathered_gradients(run)
        for name, parameter in run.model.named_parameters():
            assert (name in gradients) == (expected[name].grad is not None), name
            if name in gradients:
                whole = zero_model.local(expected[name].grad, parameter, mesh).flatten()
                torch.testing.assert_close(
                    gradients[name][: whole.numel()], whole, rtol=2e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
                )
        run.step()
    check_weights(run, next(alone)[0])


def check_weights(run: Run, reference: nn.Module) -> None:
    expected, parameters = dict(reference.named_parameters()), dict(run.model.named_parameters())
    for name, value in run.states.full_parameters():
        whole = zero_model.local(expected[name], parameters[name], run.mesh)
        torch.testing.assert_close(value, whole.detach(), rtol=0, atol=3e-6, msg=lambda m, name=name: f"{name}: {m}")


def check_cases(rank: int, world_size: int, cases: list[Case]) -> None:
    for case in cases:
        bucket = case.bucket_elements or config.BUCKET_ELEMENTS
        try:
            with mock.patch.object(config, "BUCKET_ELEMENTS", bucket), running(case) as run:
                check_parity(run)
        except Exception as error:
            raise AssertionError(f"{case}") from error


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_training_equals_one_process(zero: int) -> None:
    pipeline = Case(pp=2, dp=2, tp=1, zero=zero)
    cases = [
        pipeline,
        replace(pipeline, is_tied=False, frozen=("chain.0.", "norm.bias"), has_unused=True, num_accumulated=2, max_value=0.01),
        replace(pipeline, is_tied=False, frozen=("chain.3.", "head.", "norm."), num_microbatches=1),  # stage 1 has nothing to train
        replace(pipeline, is_interleaved=True, bucket_elements=40),  # some parameters are larger than a bucket
        Case(pp=1, dp=2, tp=2, zero=zero, is_tied=False, frozen=("up.bias",)),
    ]
    run_ranks(check_cases, 4, cases)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_data_parallel_alone_equals_one_process(zero: int) -> None:
    run_ranks(check_cases, 2, [Case(pp=1, dp=2, tp=1, zero=zero, has_unused=True, num_accumulated=2)])


@pytest.mark.parametrize("zero", [1, 3])
def test_all_axes_at_once_equal_one_process(zero: int) -> None:
    run_ranks(check_cases, 8, [Case(pp=2, dp=2, tp=2, zero=zero)])


def resume(rank: int, world_size: int, cases: list[Case]) -> None:
    for case in cases:
        with running(case) as run:
            run.train(range(2))
            kept, schedule = KeptStates(run.states), copy.deepcopy(run.schedule.state_dict())
            run.train(range(2, 4))
            expected = {name: value.clone() for name, value in run.states.full_parameters()}
        with running(case) as run:
            run.train(range(5, 6))  # other weights, moments and learning rates than those to be loaded
            kept.refill(run.states)
            run.schedule.load_state_dict(schedule)
            run.train(range(2, 4))
            for name, value in run.states.full_parameters():
                assert torch.equal(value, expected[name]), f"{case}: {name}"
            with pytest.raises(CheckpointError, match=r"optimizers with \[\] parameter groups, and"):
                run.states.refill_groups([])


def test_training_resumed_from_what_was_held_is_bitwise_the_same() -> None:
    run_ranks(resume, 4, [Case(pp=2, dp=2, tp=1, zero=zero, frozen=("chain.1.",)) for zero in (0, 1, 2, 3)])


def train_twice(rank: int, world_size: int) -> None:
    """Two trainings of one module, as ``trainer.fit`` twice: the second starts from plain parameters that the first left."""
    expected: dict[str, torch.Tensor] = {}
    for zero in (0, 1, 2, 3):
        case = Case(pp=1, dp=2, tp=1, zero=zero, frozen=("chain.1.",))
        with running(case) as run:
            before = {name: {*vars(module)} for name, module in Model(case, 0).named_modules()}
            run.train(range(2))
            run.states.dissolve()
            assert all(set(vars(parameter)) == {"lightning_par_spec"} for parameter in run.model.parameters())
            assert {name: {*vars(module)} for name, module in run.model.named_modules()} == before
            run.start()
            run.train(range(2, 4))
            for name, value in run.states.full_parameters():
                torch.testing.assert_close(
                    value, expected.setdefault(name, value.clone()), rtol=0, atol=1e-6, msg=f"zero{zero}: {name}"
                )


def test_a_module_can_be_trained_again() -> None:
    run_ranks(train_twice, 2)


def train_on_global_shapes(rank: int, world_size: int) -> None:
    """A column layer that gives a `ShardedTensor` between two modules that ZeRO-3 has hooks on."""
    case = Case(pp=1, dp=2, tp=2, zero=3)
    mesh = zero_model.build_mesh(case)
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
    model = copy.deepcopy(alone)
    splits = {"0.weight": Split(0, (10,)), "0.bias": Split(0, (10,)), "2.weight": Split(1, (10,))}
    for name, parameter in model.named_parameters():
        set_spec(parameter, ParameterSpec(name, tuple(parameter.shape), splits.get(name)))
        parameter.data = zero_model.local(parameter.data, parameter, mesh).clone()
    convert_linear(model[0], "column", mesh.tp, output="global")
    convert_linear(model[2], "row", mesh.tp)
    states = DeepSpeedStates(model, [torch.optim.SGD(model.parameters(), lr=0.5)], 3, mesh)
    inputs = torch.randn(2, 3, 6)
    for _ in range(2):
        with states.accumulate():
            output = model(inputs[mesh.dp.coordinate])
            states.after_forward()
            output.square().mean().backward()
            states.after_backward()
        states.reduce()
        states.step()
        alone.zero_grad()
        alone(inputs).square().mean().backward()
        torch.optim.SGD(alone.parameters(), lr=0.5).step()
    expected, parameters = dict(alone.named_parameters()), dict(model.named_parameters())
    for name, value in states.full_parameters():
        torch.testing.assert_close(value, zero_model.local(expected[name], parameters[name], mesh).detach(), msg=name)


def test_partitioned_parameters_under_tensors_of_global_shape() -> None:
    run_ranks(train_on_global_shapes, 4)


def train_on_transposed_gradients(rank: int, world_size: int) -> list[tuple[int, ...]]:
    """Gradients whose memory is laid out in columns, such as a callback may leave. Returns their strides."""
    case = Case(pp=1, dp=2, tp=1, zero=3)
    mesh = zero_model.build_mesh(case)
    torch.manual_seed(0)
    alone = nn.Linear(6, 10)
    model = copy.deepcopy(alone)
    states = DeepSpeedStates(model, [torch.optim.SGD(model.parameters(), lr=0.5)], 3, mesh)
    inputs = torch.randn(2, 3, 6)
    with states.accumulate():
        loss = model(inputs[mesh.dp.coordinate]).square().mean()
        states.after_forward()
        loss.backward()
        states.after_backward()
    set_gradient(model.weight, model.weight.grad.t().contiguous().t())
    strides = [model.weight.grad.stride()]
    states.reduce()
    states.step()
    alone(inputs).square().mean().backward()
    torch.optim.SGD(alone.parameters(), lr=0.5).step()
    for (name, value), expected in zip(states.full_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(value, expected.detach(), msg=name)
    return strides


def test_gradients_of_any_memory_layout_are_reduced() -> None:
    assert run_ranks(train_on_transposed_gradients, 2) == [[(1, 10)]] * 2


def fail_inside(rank: int, world_size: int, cases: list[Case]) -> list[float]:
    """One rank raises in the middle of a step. Returns what a collective right after it gives."""
    sums = []
    for case in cases:
        run = Run(case, zero_model.build_mesh(case))
        with contextlib.suppress(ZeroDivisionError), run.states.accumulate():
            tokens, targets = next(zero_model.microbatches(case, 0, run.mesh.dp.coordinate))[0]
            zero_model.loss_of(case, run.model(tokens), targets).backward()
            if rank == 0:
                raise ZeroDivisionError
        total = torch.ones(1)
        run.mesh.world.all_reduce(total)
        sums.append(total.item())
        run.states.close()
    return sums


def test_an_exception_inside_a_step_runs_no_collective_on_its_way_out() -> None:
    assert run_ranks(fail_inside, 2, [Case(pp=1, dp=2, tp=1, zero=zero) for zero in (0, 1, 2, 3)]) == [[2.0] * 4] * 2


def train_and_flush(rank: int, world_size: int, cases: list[Case]) -> None:
    for case in cases:
        with running(case) as run:
            run.train(range(2))
    sys.stdout.flush()
    sys.stderr.flush()


def test_deepspeed_prints_and_warns_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(train_and_flush, 2, [Case(pp=1, dp=2, tp=1, zero=zero) for zero in (1, 2, 3)])
    assert capfd.readouterr() == ("", "")


def test_deepspeed_is_not_imported_without_zero() -> None:
    program = "import sys, lightning_par.gradients, lightning_par.zero.partitioned; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_another_deepspeed_is_refused() -> None:
    check_deepspeed()
    with pytest.raises(ConfigurationError, match=rf"is not the one .*gone.*install deepspeed=={DEEPSPEED_VERSION}"):
        check_deepspeed((("deepspeed.runtime.engine", "DeepSpeedEngine", ("gone",)),))
    with pytest.raises(ConfigurationError, match=r"need DeepSpeed, and 'deepspeed\.gone' cannot be imported"):
        check_deepspeed((("deepspeed.gone", "Engine", ()),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: [torch.optim.SGD(model.parameters()), torch.optim.SGD(model.parameters())],
            "zero2 steps one optimizer, .* gave 2",
        ),
        (lambda model: [torch.optim.Adafactor(model.parameters())], "Adafactor needs whole ones"),
        (lambda model: [torch.optim.SGD(model.bfloat16().parameters())], "weight is torch.bfloat16: use precision=bf16-true"),
        (
            lambda model: [torch.optim.SGD(model.double().parameters())],
            r"zero2 keeps parameters in float32 here, and weight is torch.float64: use module.float\(\) before the run, or zero0",
        ),
    ],
)
def test_what_zero_cannot_train_is_refused(change: Callable[[nn.Module], list[torch.optim.Optimizer]], message: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match=message):
        DeepSpeedStates(model, change(model), 2, mesh=None)
