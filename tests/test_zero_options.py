"""The options of ZeRO: each trains as one process does, keeps and sends what its formula says, or is refused by name."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn
from transformers import GPT2LMHeadModel  # noqa: F401  # before the fork

from benchmarks.counting import CollectiveCounter, settled
from lightning_par.layout import Layout, parse_layout
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.parameter import ParameterSpec, set_spec
from lightning_par.zero.option import ZeroOptions
from lightning_par.zero.partitioned import DeepSpeedStates
from tests.living import Living
from tests.models import gpt2
from tests.parity import Run, compare, train_alone, train_rank
from tests.ranks import COLLECTIVE_TIMEOUT, run_ranks
from tests.test_zero import NUM_STEPS, check_cases, check_parity, resume, running
from tests.zero_model import Case

SLOW = pytest.mark.slow  # beside a case that proves the same at another stage or size
MICROBATCH = ZeroOptions(reduce="microbatch")


@pytest.mark.parametrize("zero", [2, 3])
def test_gradients_reduced_at_every_microbatch_train_as_one_process_does(zero: int) -> None:
    pipeline = Case(pp=2, dp=2, tp=1, zero=zero, options=MICROBATCH)
    cases = [
        pipeline,
        replace(pipeline, is_tied=False, frozen=("chain.0.", "norm.bias"), num_accumulated=2, max_value=0.01),
        replace(pipeline, is_tied=False, frozen=("chain.3.", "head.", "norm."), num_microbatches=1),
        replace(pipeline, is_interleaved=True, bucket_elements=40),
        replace(pipeline, is_interleaved=True, options=ZeroOptions(reduce="microbatch", offload_optimizer="cpu")),
        Case(pp=1, dp=2, tp=2, zero=zero, options=MICROBATCH, is_tied=False, frozen=("up.bias",), has_unused=True),
    ]
    run_ranks(check_cases, 4, cases)


@pytest.mark.parametrize("zero", [pytest.param(1, marks=SLOW), 2, 3])
def test_offloaded_states_train_as_one_process_does(zero: int) -> None:
    offload = ZeroOptions(offload_optimizer="cpu")
    cases = [
        Case(pp=2, dp=2, tp=1, zero=zero, options=offload, num_accumulated=2),
        Case(pp=2, dp=2, tp=1, zero=zero, options=offload, is_tied=False, frozen=("chain.0.", "norm.bias"), has_unused=True),
    ]
    if zero == 3:
        cases.append(replace(cases[0], options=ZeroOptions(offload_optimizer="cpu", offload_param="cpu")))
    run_ranks(check_cases, 4, cases)


def test_training_resumed_with_options_is_bitwise_the_same() -> None:
    pipeline = Case(pp=2, dp=2, tp=1, zero=2, frozen=("chain.1.",), options=ZeroOptions(offload_optimizer="cpu"))
    persistent = ZeroOptions(config={"zero_optimization": {"stage3_param_persistence_threshold": 20}})
    cases = [pipeline, replace(pipeline, zero=3), replace(pipeline, zero=3, options=persistent)]
    run_ranks(resume, 4, [*cases, replace(pipeline, options=MICROBATCH)])


class OwnAdamW(torch.optim.AdamW):
    """What a user makes of AdamW."""


@pytest.mark.parametrize("zero", [pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3])
def test_other_optimizers_and_settings_train_as_one_process_does(zero: int) -> None:
    """Four parameter groups, of which a stage has some, and a learning-rate schedule."""
    config = {"zero_optimization": {"sub_group_size": 50} if zero == 3 else {"contiguous_gradients": False}}
    pipeline = Case(pp=2, dp=2, tp=1, zero=zero, optimizer=OwnAdamW, options=ZeroOptions(config=config))
    run_ranks(check_cases, 4, [pipeline, replace(pipeline, optimizer=torch.optim.NAdam, options=ZeroOptions())])


@pytest.mark.slow  # it compiles for a minute where it has not been compiled before
def test_deepspeeds_own_adam_trains_as_one_process_does() -> None:
    offload = ZeroOptions(offload_optimizer="cpu")
    cases = [Case(pp=2, dp=2, tp=1, zero=zero, options=offload, optimizer=DeepSpeedCPUAdam) for zero in (1, 2, 3)]
    DeepSpeedCPUAdam([nn.Parameter(torch.zeros(1))])  # compiled before the ranks wait for each other
    run_ranks(check_cases, 4, cases)


def check_second_partition(rank: int, world_size: int, case: Case) -> None:
    with running(case) as run:
        check_parity(run)
        run.accumulate(NUM_STEPS)
        parameters: list[Any] = list(run.model.parameters())
        for parameter in parameters:  # half of it on two ranks each, beside a quarter on each of four
            assert parameter.ds_secondary_tensor.numel() == 2 * parameter.ds_tensor.numel()


def test_a_second_partition_trains_as_one_process_does() -> None:
    run_ranks(check_second_partition, 4, Case(pp=1, dp=4, tp=1, zero=3, options=ZeroOptions(hpz_partition_size=2)))


WIDTH, DEPTH, MICROBATCHES = 8, 4, 3
ELEMENTS = DEPTH * WIDTH * WIDTH  # Ψ
FP32 = 4


@dataclass(frozen=True)
class Cost:
    """Of one step on one rank.

    Attributes:
        sent: elements that it sends.
        made: bytes of gradients that the microbatches leave for the end of the step.
        held: bytes of a buffer for gradients that is always there.
    """

    sent: int
    made: int
    held: int


def measure_step(rank: int, world_size: int, zero: int, choices: list[ZeroOptions]) -> list[Cost]:
    """The second step of a chain of layers, all of one size, over replicas."""
    mesh = Mesh(Layout(dp=world_size, zero=zero), COLLECTIVE_TIMEOUT)
    costs = []
    for options in choices:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)))
        for name, parameter in model.named_parameters():
            set_spec(parameter, ParameterSpec(name, tuple(parameter.shape)))
        states = DeepSpeedStates(model, [torch.optim.AdamW(model.parameters())], zero, mesh, options)
        for _ in range(2):
            plain = (torch.Tensor, nn.Parameter)  # other tests in this process leave tensors of other kinds, without memory
            before = [held.detach() for held in gc.get_objects() if type(held) in plain]  # no new one gets its address
            living, sent = Living(before), states.sent_bytes
            with CollectiveCounter() as counter:
                with living, states.accumulate():
                    for _ in range(MICROBATCHES):
                        loss = model(torch.ones(2, WIDTH)).square().mean()
                        states.after_forward()
                        loss.backward()
                        del loss
                        states.after_backward()
                made = settled(living.num_bytes)
                states.reduce()
                states.step()
                states.zero_grad()
        assert states.sent_bytes - sent == counter.sent_bytes.total()  # as the monitor counts it
        held = getattr(states.engine.zero, "grad_partitions_flat_buffer", torch.empty(0)).nbytes
        costs.append(Cost(counter.sent_bytes.total() // FP32, made, held))
        states.close()
    return costs


@pytest.mark.parametrize("dp", [2, pytest.param(4, marks=SLOW)])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bytes_sent_and_kept_are_those_of_the_formula(zero: int, dp: int) -> None:
    """ZeRO, arXiv 1910.02054, section 7: 2Ψ for stages 1 and 2, 3Ψ for stage 3, each of a pass around a ring of d ranks.

    With several microbatches stage 3 gathers for each forward and each backward, and ``reduce: microbatch`` reduces for each.
    """
    choices = [ZeroOptions(), MICROBATCH][: 1 if zero == 1 else 2]
    gathers = 2 * MICROBATCHES if zero == 3 else 1
    for costs in run_ranks(measure_step, dp, zero, choices):
        for options, cost in zip(choices, costs, strict=True):
            is_early = options is MICROBATCH
            reductions = MICROBATCHES if is_early else 1
            assert cost.sent == (gathers + reductions) * ELEMENTS * (dp - 1) // dp
            part = FP32 * ELEMENTS // dp
            kept = part if is_early else FP32 * ELEMENTS + (part if zero == 3 else 0)
            assert (cost.made + cost.held, cost.held) == (kept, part if zero == 3 else 0)


def train_ranks(rank: int, world_size: int, word: str, choices: list[dict[str, Any]]) -> list[Run]:
    layout = parse_layout(word).resolve(world_size)
    return [train_rank(gpt2, layout, rank, zero=zero) for zero in choices]


@pytest.mark.parametrize(
    ("word", "choices"),
    [
        ("pp2_vp2_dp2_zero2", [{"reduce": "microbatch"}, {"offload_optimizer": "cpu"}]),
        ("tp2_dp2_zero3", [{"reduce": "microbatch", "offload_optimizer": "cpu"}, {"offload_param": "cpu"}]),
    ],
)
def test_options_of_the_strategy_train_as_one_process_does(word: str, choices: list[dict[str, Any]]) -> None:
    """A tied head, two parameter groups, clipping. Gradients are compared above: here they have gone by the time of the hook."""
    layout = parse_layout(word).resolve(4)
    alone = train_alone(gpt2, 2)
    alone.gradients.clear()
    for ranks in zip(*run_ranks(train_ranks, 4, word, choices), strict=True):
        for run in ranks:
            run.gradients.clear()
        compare(alone, list(ranks), layout)
