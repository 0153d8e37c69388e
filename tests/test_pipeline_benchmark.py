"""The benchmark of pipelines: what its stages cost, what its table says, and that every system computes the same."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from benchmarks import napping, pace, pace_table, pipeline
from benchmarks.napping import NUM_BLOCKS, Naps, compute_truth, make_batch, make_chain
from benchmarks.pace import IDEAL_SECONDS, Effort, Row, Times

OURS = Row("lightning_par", "1f1b", (1.6, 1.4), (0.03, 0.02), (0.05, 0.04, 0.06), (0.01, 0.02), 0.375)
TORCH = Row("torch", "1f1b", (1.5,), (0.01,), (0.08,), (0.04,), 0.375)
DEEPSPEED = Row("DeepSpeed", "1f1b", (2.0,), (0.01,), (0.1,), (0.05,), 0.375)
WRONG = Row("torch", "zb-v v2", (), (), (), (), 0.1, wrong="the loss is 1.0, and 2.0 in one process")


@pytest.mark.parametrize("num_stages", [4, 8, 16])
def test_every_part_of_every_stage_sleeps_once(monkeypatch: pytest.MonkeyPatch, num_stages: int) -> None:
    slept: list[float] = []
    monkeypatch.setattr(Naps, "sleep", lambda naps, seconds: slept.append(seconds) if seconds else None)
    size = NUM_BLOCKS // num_stages  # one block of a stage sleeps for all of them
    chain = make_chain(Naps(forward=1.0, input_gradient=2.0, weight_gradient=4.0), num_stages)
    loss = chain.training_step(make_batch(), 0)
    assert slept == [1.0 * size] * num_stages
    slept.clear()
    hidden = chain.blocks[0].linear.weight
    (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    below = [2.0 * size] * (num_stages - 1)  # of the first stage only its weight's part: nothing else was asked for
    assert sorted(slept) == [*below, 4.0 * size], "a weight's part only where its gradient is computed"
    slept.clear()
    loss.backward()
    assert sorted(slept) == [2.0 * size] * num_stages + [4.0 * size] * num_stages
    assert torch.equal(chain.blocks[0].linear.weight.grad, gradient)


def test_work_is_the_same_for_a_rank_however_many_stages_it_has() -> None:
    naps = Naps()
    naps.work(0.04)
    assert naps.forward * NUM_BLOCKS / napping.NUM_RANKS == pytest.approx(0.04)


class Clock:
    """Time that passes while something sleeps, ``late`` longer than was asked for, and where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.late, self.asked = 0.0, 0.0, list[float]()
        monkeypatch.setattr(napping, "time", SimpleNamespace(sleep=self.sleep, perf_counter=lambda: self.now))

    def sleep(self, seconds: float) -> None:
        self.asked.append(seconds)
        self.now += seconds + self.late


def test_a_nap_that_ends_late_makes_the_next_ones_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, naps = Clock(monkeypatch), Naps()
    clock.late = 0.03
    naps.sleep(0.04)
    clock.late = 0.0
    for seconds in (0.0, 0.02, 0.02, 0.04):
        naps.sleep(seconds)
    assert clock.asked == pytest.approx([0.04, 0.0, 0.01, 0.04]) and clock.now == pytest.approx(0.12)


def test_what_blocks_compute_longer_than_without_work_makes_naps_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, naps = Clock(monkeypatch), Naps()

    def compute(part: str, *seconds: float, nap: float = 0.0) -> None:
        for each in seconds:
            naps.begin(part)
            naps.sleep(nap)  # of another part, which is no computing
            clock.now += each
            naps.end(part)

    naps.work(0.0)
    compute("F", 0.9)
    naps.work(0.0)  # forgets
    compute("F", 0.001, 0.05, 0.002)  # the median counts: one step may have been disturbed
    compute("I", 0.004)
    naps.work(0.04)
    compute("F", 0.005)
    assert naps.made_up == pytest.approx(0.003)
    naps.sleep(0.04)
    compute("I", 0.001, nap=0.01)  # quicker than without work
    naps.sleep(0.04)
    compute("W", 0.7)  # not known from steps without work: whatever it takes is the system's
    naps.sleep(0.04)
    assert clock.asked == pytest.approx([0.037, 0.01, 0.043, 0.04]) and naps.made_up == pytest.approx(0.0)


def test_what_is_part_of_another_part_is_not_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, naps = Clock(monkeypatch), Naps()
    naps.work(0.0)
    naps.begin("I")
    clock.now += 0.001
    naps.begin("W")  # the gradient of a weight, in the middle of a whole backward
    clock.now += 0.002
    naps.end("W")
    clock.now += 0.004
    naps.end("I")
    naps.end("F")  # has not begun
    assert naps._without_work == {"I": [pytest.approx(0.007)]}


@pytest.mark.parametrize("num_stages", [4, 16])
def test_what_each_stage_computes_is_measured_once(num_stages: int) -> None:
    naps = Naps()
    naps.work(0.0)
    loss = make_chain(naps, num_stages).training_step(make_batch(), 0)
    assert measured(naps) == {"F": num_stages}
    loss.backward()
    assert measured(naps) == {"F": num_stages, "I": num_stages}


def test_a_weight_gradient_that_autograd_computes_apart_is_measured() -> None:
    naps = Naps()
    naps.work(0.0)
    stage, x = make_chain(naps, NUM_BLOCKS).blocks[1], make_batch()[0].requires_grad_()
    _, groups = stage_backward_input([stage(x).sum()], None, [x], iter([stage.linear.weight]))
    assert measured(naps) == {"F": 1, "I": 1}
    stage_backward_weight(iter([stage.linear.weight]), groups)
    assert measured(naps) == {"F": 1, "I": 1, "W": 1} and stage.linear.weight.grad is not None


def measured(naps: Naps) -> dict[str, int]:
    return {part: len(times) for part, times in naps._without_work.items()}


def test_a_turn_has_steps_without_work_and_then_with(monkeypatch: pytest.MonkeyPatch) -> None:
    naps, times, seen = Naps(), Times(), list[bool]()

    def step() -> None:
        seen.append(naps.forward > 0)
        naps.made_up += 0.25

    monkeypatch.setattr(pace, "time_step", lambda step: (step(), (float(len(seen)), 0.5))[1])
    monkeypatch.setattr(pace, "_most", lambda seconds: 2 * seconds)
    pace._take_turn(SimpleNamespace(step=step), naps, Effort(1, 2, 4), times)
    assert seen == [False] * (1 + 4) + [True] * 2
    assert (times.idle_seconds, times.seconds, times.made_up_seconds) == ([2, 3, 4, 5], [6, 7], [0.5, 0.5])


def test_what_a_nap_computes_leaves_nothing_behind() -> None:
    naps = Naps()
    chain, batch = make_chain(naps), make_batch()
    chain.training_step(batch, 0).backward()
    gradients, generator = [p.grad.clone() for p in chain.parameters()], torch.get_rng_state()
    chain.zero_grad()
    naps.forward = naps.input_gradient = naps.weight_gradient = 1e-9
    chain.training_step(batch, 0).backward()
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(chain.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


def test_what_differs_from_one_process_is_found() -> None:
    truth = compute_truth()
    truth.check(truth.loss, truth.gradients)
    truth.check(None, {})
    with pytest.raises(ValueError, match=r"the loss is .*, and .* in one process"):
        truth.check(truth.loss * 1.001, {})
    name = "blocks.3.linear.weight"
    with pytest.raises(ValueError, match=rf"the gradient of {name} is off by 1\.0e-03"):
        truth.check(None, {name: truth.gradients[name] * 1.001})


def test_the_table_compares_the_least_times() -> None:
    names = [*pace_table.HEADINGS[:5], "overhead", "made up", "theory"]
    line = dict(zip(names, pace_table.lines([OURS, TORCH, DEEPSPEED])[0], strict=False))
    assert line["step ms"] == "1400.0"
    assert line["to DeepSpeed"] == "0.70"
    assert line["overhead"] == f"{100 * ((1.4 - 0.04) / IDEAL_SECONDS - 1):.1f}"
    assert line["made up"] == f"{100 * 0.02 / IDEAL_SECONDS:.1f}", "of the quickest step"
    assert line["theory"] == "37.5"
    assert pace_table.ratio(OURS, [OURS, TORCH], "torch", "idle_seconds") == pytest.approx(0.5)
    assert pace_table.ratio(OURS, [OURS, TORCH], "torch", "cpu_seconds") == pytest.approx(0.25)
    assert pace_table.ratio(OURS, [OURS, WRONG], "torch") is None


def test_a_system_that_computes_something_else_has_no_times_and_ends_with_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [OURS, TORCH, DEEPSPEED, WRONG]
    monkeypatch.setattr(pipeline, "measure", lambda effort: rows)
    assert pipeline.main([]) == 1
    printed = capsys.readouterr()
    assert "torch, zb-v v2: the loss is 1.0, and 2.0 in one process" in printed.err
    assert "wrong" in printed.out
    rows.pop()
    assert pipeline.main(["--markdown"]) == 0
    assert "| 1f1b | lightning_par | 1400.0 | 1500.0 | 0.70 |" in capsys.readouterr().out
    assert pipeline.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["overhead"] == pytest.approx(OURS.overhead)


@pytest.mark.slow
def test_every_system_computes_what_one_process_does() -> None:
    rows = pipeline.measure("quick")
    assert not [row for row in rows if row.wrong]
    assert {row.system for row in rows} == {"lightning_par", "torch", "DeepSpeed"}
