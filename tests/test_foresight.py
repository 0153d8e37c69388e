"""The benchmark of forecasts: what sleeps and what is slow, how forecasts are judged, its tables, and a few of its runs."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import pytest
import torch
import torch.distributed as dist

from benchmarks import foresight, foresight_memory, sleeping
from benchmarks.foresight_memory import Peak, activation_errors, foresee, inexact, make_demo, measure_ranks
from benchmarks.foresight_memory import Row as Memory
from benchmarks.foresight_table import Findings, draw, render_json, render_markdown, render_table, wrong
from benchmarks.foresight_time import (
    BATCH,
    Row,
    make_cluster,
    make_estimator,
    measure_rank,
    plan_for,
    rank_correlation,
    regret,
    ways,
)
from benchmarks.sleeping import LENGTH, WIDTH, SleepingDevice, block_flops, make_batch, make_chain
from benchmarks.slow_links import SlowLinks, TokenBucket, now, ring_messages, ring_sent
from benchmarks.storage import KINDS, Case
from benchmarks.storage import Row as Stored
from lightning_par.layout import Layout
from lightning_par.planner import Cluster, Device, Link
from tests.ranks import run_ranks

STORED = Stored("pp2", 1, dict.fromkeys(KINDS, 100), dict.fromkeys(KINDS, 100))
TIMES = [Row(2, "parallel=pp2_mb4", 1.0, 1.1, 5), Row(2, "parallel=tp2_mb2", 2.0, 2.0, 5), Row(2, "parallel=dp2_mb2", 3.0, 3.2, 5)]


def two_nodes(inside: float = 1e6, between: float = 1e5, per_node: int = 1) -> Cluster:
    device = Device(2**30, 0.0, 1.0, {}, {}, 0.0)
    return Cluster("test", 2, per_node, device, Link(inside, 0.01), Link(between, 0.02), "made up")


# ---------------------------------------------------------------------- what sleeps


def test_a_process_sleeps_for_the_products_that_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(sleeping, "sleep_until", slept.append)
    monkeypatch.setattr(sleeping, "now", lambda: 0.0)
    module, rows = make_chain(), 3
    with SleepingDevice(2.0):
        loss = module.training_step(make_batch(rows), 0)
        forward = len(slept)
        loss.backward()
    product = rows * LENGTH * 2 * WIDTH * 4 * WIDTH / 2.0
    assert slept[:forward] == [product] * 16 and block_flops(rows) == 2 * 2.0 * product
    assert slept[forward:] == [product] * 31, "of the input of all nothing has a gradient"
    torch.ones(2, 2) @ torch.ones(2, 2)
    assert len(slept) == 47, "it is over"


def test_sleeping_includes_the_product() -> None:
    first = torch.ones(8, 8)
    with SleepingDevice(2 * 8**3 / 0.05):
        begin = time.monotonic()
        first @ first
        first + first
        assert time.monotonic() - begin >= 0.05


# ---------------------------------------------------------------------- what is slow


def test_messages_take_their_tokens_one_after_the_other() -> None:
    bucket = TokenBucket(100.0)
    assert [bucket.take(50.0, at) for at in (1.0, 1.0, 1.2, 9.0)] == pytest.approx([1.5, 2.0, 2.5, 9.5])  # none are saved up


def test_a_ring_sends_what_the_textbook_says() -> None:
    assert ring_sent("all-reduce", 400, 4) == 600 and ring_messages("all-reduce", 4) == 6
    assert ring_sent("all-gather", 400, 4) == ring_sent("reduce-scatter", 400, 4) == 300 and ring_messages("all-gather", 4) == 3
    assert ring_sent("reduce", 400, 4) == 400 and ring_messages("reduce", 4) == 3


def talk(rank: int, world_size: int) -> dict[str, float]:
    """Of two ranks on two nodes: when messages were posted and there, by the clock of the machine, and how long collectives are."""
    links, at, group = SlowLinks(two_nodes(), rank), dict[str, float](), dist.distributed_c10d._get_default_group()
    tensor, received = torch.ones(5000), torch.empty(5000)  # 20,000 bytes: 0.2 s
    collectives: dict[str, Any] = {
        "all-reduce": lambda: dist.all_reduce(tensor, async_op=True),
        "all-gather": lambda: dist.all_gather([received[:2500], received[2500:]], tensor[:2500], async_op=True),
        "reduce": lambda: dist.reduce(tensor, 0, async_op=True),
    }
    with links.installed():
        links.is_on = True
        for name, begin in collectives.items():
            dist.barrier()
            at["begin"] = now()
            work = begin()
            at[f"{name} posted"] = now() - at["begin"]
            work.wait()
            at[f"{name} waited"] = now() - at["begin"]
            at[name] = work.over_at - float(work.stamp)
        assert torch.equal(received, torch.full((5000,), 2.0))  # the all-gather of what the all-reduce gave
        dist.barrier()
        at["begin"] = now()
        works = [group.send([received], 1, tag) if rank == 0 else group.recv([tensor], 0, tag) for tag in range(2)]
        at["posted"] = now()
        for number, work in enumerate(works):
            work.wait()
            at[f"message {number}"] = now()
        with pytest.raises(ValueError, match="broadcast: it has no formula here, and would be too quick"):
            dist.broadcast(tensor, 0)
        links.is_on = False
    assert torch.equal(tensor, received) or rank == 0
    at["begin"] = now()
    dist.all_reduce(tensor)
    at["when off"] = now() - at["begin"]
    return at


@pytest.mark.alone
def test_messages_are_late_and_who_posts_them_is_not() -> None:
    sender, receiver = run_ranks(talk, 2)
    for at in (sender, receiver):
        assert at["all-reduce"] == pytest.approx(0.2 + 2 * 0.02)  # 2 n / 2 in two messages
        assert at["all-gather"] == pytest.approx(0.1 + 0.02)
        assert at["reduce"] == pytest.approx(0.2 + 0.02)  # the root waits as long
        for name in ("all-reduce", "all-gather", "reduce"):
            assert at[f"{name} posted"] < at[name] <= at[f"{name} waited"] + 1e-6
        assert at["when off"] < 0.2
    began = sender["posted"]  # at most so long after the first message has taken its tokens
    assert sender["message 0"] - began > 0.1 and sender["message 1"] - began > 0.3
    assert receiver["message 1"] - sender["message 1"] > -0.01 and receiver["message 0"] - began > 0.1
    assert sender["posted"] < sender["message 0"] and receiver["posted"] < receiver["message 0"]


# ---------------------------------------------------------------------- how forecasts are judged


def test_the_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1.0, 2.0, 30.0], [5.0, 6.0, 7.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    # ranks 1.5 1.5 3 4 and 2 1 3 4
    assert rank_correlation([1.0, 1.0, 3.0, 4.0], [0.2, 0.1, 3.0, 4.0]) == pytest.approx(4.5 / (4.5 * 5.0) ** 0.5)


def test_regret_is_that_of_the_layout_that_is_chosen() -> None:
    assert regret(TIMES) == 0
    quicker = replace(TIMES[1], measured=1.0)
    assert regret([TIMES[0], quicker]) == pytest.approx(0.1)
    assert regret([TIMES[0], quicker, replace(quicker, forecast=1.0, memory=4)]) == 0  # of equal ones the smallest


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Findings(TIMES, [Memory("demo", STORED)]), []),
        (
            Findings([replace(TIMES[0], forecast=9.0), *TIMES[1:]], [Memory("demo", STORED)]),
            [
                "2 processes: the rank correlation is -0.500, less than 0.9",
                "2 processes: parallel=tp2_mb2 is 81.8% slower than the quickest",
                "all processes: the rank correlation is -0.500, less than 0.9",
            ],
        ),
        (
            Findings([replace(TIMES[0], loss_error=1e-3), *TIMES[1:]], [Memory("demo", STORED)]),
            ["2 processes, parallel=pp2_mb4: the loss is off by 1.0e-03 of that in one process"],
        ),
        (
            Findings(TIMES, [Memory("demo", replace(STORED, expected={**STORED.expected, "states": 99, "activations": 110}))]),
            [
                "demo, pp2, rank 1: states are 100 bytes; the planner says 99",
                "activations are off by 10.0% in the median and 10.0% at the worst",
            ],
        ),
    ],
)
def test_what_is_wrong(
    found: Findings, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wrong(found) == words
    monkeypatch.setattr(foresight, "measure", lambda quick: found)
    assert foresight.main([]) == bool(words)
    assert ("\n".join(words) or "every line holds") in capsys.readouterr().err


def test_the_tables_and_the_picture(tmp_path: Path) -> None:
    found = Findings(TIMES, [Memory("demo", STORED)], [Peak("demo", "single", 2 << 20, 3 << 20)])
    page = render_markdown(found)
    assert "| 2 | pp2_mb4 | pp2_mb4 | 3 | 1.000 | 0.0 | 1100 | 1100 | 6.2 |" in page
    assert "| demo | 1 | 1 | 0 | 0.00 | 0.00 |" in page and "| demo | single | 2.0 | 3.0 | +50.0 |" in page
    assert "pp2_mb4" in render_table(found) and json.loads(render_json(found))["times"][0]["measured"] == 1.1
    draw(TIMES, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 5000


def test_help_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        foresight.main(["--help"])
    assert "python -m benchmarks.foresight" in capsys.readouterr().out


# ---------------------------------------------------------------------- runs


def test_layouts_are_all_meshes_with_every_zero_and_schedule() -> None:
    found = list(ways(make_cluster(8)))
    layouts = [candidate.layout for candidate in found]
    assert len(set(found)) == len(found) > 100 and {layout.world_size for layout in layouts} == {8}
    assert {candidate.samples for candidate in found} == {BATCH}
    assert {layout.zero for layout in layouts} == {0, 1, 2, 3} and {layout.tp for layout in layouts} == {1, 2, 4}
    assert {candidate.schedule for candidate in found} == {"1f1b", "zb-h1", "interleaved", "interleaved-zb", "zb-v"}
    assert {(layout.tp, layout.pp, layout.vp) for layout in layouts} >= {(1, 8, 1), (1, 2, 4), (2, 2, 2), (4, 2, 4)}
    assert {layout.sp for layout in layouts if layout.tp > 1} == {True, False}


@pytest.mark.slow
def test_a_step_takes_what_is_forecast() -> None:
    """At least, and not much more: the machine that runs the tests has other things to do."""
    cluster = make_cluster(2)
    estimator, known = make_estimator(cluster), dict[Any, Any]()
    two = [candidate for candidate in ways(cluster) if candidate.layout == Layout(dp=2, zero=candidate.layout.zero, microbatches=2)]
    cases = [(candidate, plan_for(candidate, known)) for candidate in two]
    assert [candidate.layout.zero for candidate in two] == [0, 1, 2, 3]
    first, second = run_ranks(measure_rank, 2, cases, cluster, 1)
    truth = make_chain().training_step(make_batch(1), 0).item()
    for candidate, (seconds, loss), (again, _) in zip(two, first, second, strict=True):
        assert seconds == again and loss == pytest.approx(truth)
        assert estimator.estimate(candidate).step_seconds <= 1.001 * seconds < 6 * estimator.estimate(candidate).step_seconds


def measure_as_if_on_gpu(rank: int, world_size: int) -> list[Peak]:
    cuda: Any = torch.cuda
    cuda.is_available, cuda.reset_peak_memory_stats = lambda: True, lambda: None
    cuda.memory_allocated, cuda.max_memory_allocated = lambda: 1, lambda: 3
    foresight_memory.GPU, foresight_memory.ON_GPU = "cpu", foresight_memory.Size(length=16)
    return foresight_memory.measure_on_gpu(rank, world_size)


@pytest.mark.slow
def test_what_it_does_on_a_gpu() -> None:
    """On a CPU, which counts nothing: that it trains, and what it compares with."""
    (peaks,) = run_ranks(measure_as_if_on_gpu, 1)
    assert [peak.measured for peak in peaks] == [2] * 12 and {peak.model for peak in peaks} == {"demo", "GPT-2", "Llama"}
    demo = {peak.case: peak.expected for peak in peaks if peak.model == "demo"}
    assert demo["dp1_mb2 full"] < demo["dp1_mb2"] < demo["single"]


def test_ranks_store_what_the_planner_says() -> None:
    cases = (Case("pp2_mb4"), Case("dp2_zero1_mb2"))
    rows = [row for rank in run_ranks(measure_ranks, 2, "demo", cases, foresee(make_demo, cases)) for row in rank]
    assert len(rows) == 4 and inexact(rows) == [] and max(activation_errors(rows)) < 0.03
