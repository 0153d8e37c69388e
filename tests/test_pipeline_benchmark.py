"""The benchmark of pipelines: what its stages cost, what its table says, and that every system computes the same."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import napping, pace, pace_table, pipeline
from benchmarks.napping import NUM_BLOCKS, Naps, compute_truth, make_batch, make_chain
from benchmarks.pace import IDEAL_SECONDS, Effort, Row, Times

OURS = Row("lightning_par", "1f1b", (1.6, 1.4), (1.45,), (0.05, 0.04, 0.06), (0.01, 0.02), 0.375)
TORCH = Row("torch", "1f1b", (1.5,), (1.6,), (0.08,), (0.04,), 0.375)
DEEPSPEED = Row("DeepSpeed", "1f1b", (2.0,), (2.1,), (0.1,), (0.05,), 0.375)
WRONG = Row("torch", "zb-v v2", (), (), (), (), 0.1, wrong="the loss is 1.0, and 2.0 in one process")


@pytest.mark.parametrize("num_stages", [4, 8, 16])
def test_every_part_of_every_stage_sleeps_once(monkeypatch: pytest.MonkeyPatch, num_stages: int) -> None:
    slept: list[float] = []
    monkeypatch.setattr(Naps, "sleep", lambda naps, seconds: slept.append(seconds) if seconds else None)
    size = NUM_BLOCKS // num_stages  # the first block of a stage sleeps for all of them
    chain = make_chain(Naps(forward=1.0, input_gradient=2.0, weight_gradient=4.0), num_stages)
    loss = chain.training_step(make_batch(), 0)
    assert slept == [1.0 * size] * num_stages
    slept.clear()
    hidden = chain.blocks[0].linear.weight
    (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert sorted(slept) == [2.0 * size] * num_stages + [4.0 * size], "a weight's part only where its gradient is computed"
    slept.clear()
    loss.backward()
    assert sorted(slept) == [2.0 * size] * num_stages + [4.0 * size] * num_stages
    assert torch.equal(chain.blocks[0].linear.weight.grad, gradient)


def test_work_is_the_same_for_a_rank_however_many_stages_it_has() -> None:
    naps = Naps()
    naps.work(0.04)
    assert naps.forward * NUM_BLOCKS / napping.NUM_RANKS == pytest.approx(0.04)


def test_a_nap_that_ends_late_makes_the_next_one_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = 0.0, list[float]()

    def sleep(seconds: float) -> None:
        nonlocal now
        asked.append(seconds)
        now += seconds + (0.03 if len(asked) == 1 else 0.0)

    monkeypatch.setattr(napping, "time", SimpleNamespace(sleep=sleep, perf_counter=lambda: now))
    naps = Naps(is_warm=False)
    for seconds in (0.04, 0.0, 0.02, 0.02, 0.04):
        naps.sleep(seconds)
    assert asked == pytest.approx([0.04, 0.0, 0.01, 0.04]) and now == pytest.approx(0.12)


def test_a_warm_nap_takes_as_long_and_ends_with_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    now, events = 0.0, list[float | str]()

    def sleep(seconds: float) -> None:
        nonlocal now
        events.append(seconds)
        now += seconds

    def rehearse(naps: Naps) -> None:
        nonlocal now
        events.append("computes")
        now += 0.0005

    monkeypatch.setattr(napping, "time", SimpleNamespace(sleep=sleep, perf_counter=lambda: now))
    monkeypatch.setattr(Naps, "rehearse", rehearse)
    naps = Naps()
    naps.sleep(0.04)
    lead = napping._REHEARSAL_SECONDS
    assert events == [pytest.approx(0.04 - lead), "computes", pytest.approx(lead - 0.0005)] and now == pytest.approx(0.04)
    naps.sleep(0.001)  # too short to sleep before
    assert events[3:] == [0.0, "computes", pytest.approx(0.0005)] and now == pytest.approx(0.041)


def test_a_turn_has_steps_without_work_then_with_warm_naps_then_with_cold_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    naps, times, seen = Naps(), Times(), list[tuple[bool, bool]]()
    pipeline = SimpleNamespace(step=lambda: seen.append((naps.forward > 0, naps.is_warm)))
    monkeypatch.setattr(pace, "time_step", lambda step: (step(), (float(len(seen)), 0.5))[1])
    pace._take_turn(pipeline, naps, Effort(1, 2, 3, 4), times)
    assert seen == [(False, True)] * (1 + 4) + [(True, True)] * 2 + [(True, False)] * 3
    assert (times.idle_seconds, times.seconds, times.cold_seconds) == ([2, 3, 4, 5], [6, 7], [8, 9, 10])


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
    names = [*pace_table.HEADINGS[:5], "overhead", "cold", "theory"]
    line = dict(zip(names, pace_table.lines([OURS, TORCH, DEEPSPEED])[0], strict=False))
    assert line["step ms"] == "1400.0"
    assert line["to DeepSpeed"] == "0.70"
    assert line["overhead"] == f"{100 * ((1.4 - 0.04) / IDEAL_SECONDS - 1):.1f}"
    assert line["cold"] == f"{100 * ((1.45 - 0.04) / IDEAL_SECONDS - 1):.1f}"
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
