"""What tensor parallelism communicates, counted as `benchmarks.communication` counts it: exactly the formula, nothing more."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from benchmarks.communication import SIZES, main
from benchmarks.counting import CollectiveCounter, ring_bytes
from benchmarks.llama import BATCH, HEADS, LENGTH, WIDTH, Truth
from benchmarks.systems import SYSTEMS, Step, System, install_dtensor
from benchmarks.traffic import LayerTraffic, Row, differences, expected_traffic, measure_rank
from benchmarks.traffic_table import HEADINGS, lines, render_json, render_markdown, render_table
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(system for system in SYSTEMS if system.is_ours)


def quiet(progress: str) -> None:
    pass


@pytest.mark.parametrize("tp", SIZES)
def test_a_layer_communicates_what_the_formula_says(tp: int) -> None:
    for rows in run_ranks(measure_rank, tp, OURS, [HEADS // 2], quiet):
        assert [row.system for row in rows] == [system.name for system in OURS]
        assert differences(rows) == []


@pytest.mark.parametrize("tp", SIZES)
def test_the_formula_is_that_of_megatron(tp: int) -> None:
    for is_sequence_parallel, calls in ((False, 4), (True, 8)):
        expected = expected_traffic(tp, is_sequence_parallel)
        assert (expected.num_calls, expected.sent_bytes) == (calls, 8 * BATCH * LENGTH * WIDTH * 4 * (tp - 1) // tp)


# ---------------------------------------------------------------------- the counter


class Known(torch.autograd.Function):
    """An all-reduce of 96 bytes forward; an all-gather to 192 and a reduce-scatter of 192 backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        grad = torch.ones(6, 4)
        whole = torch.empty(12, 4)
        dist.all_gather_into_tensor(whole, grad)
        dist.reduce_scatter_tensor(grad, whole)
        return grad


def count_known(rank: int, world_size: int) -> list[tuple[dict[str, int], dict[str, int]]]:
    alone = [dist.new_group([other]) for other in range(world_size)][rank]
    x, mesh = torch.ones(6, 4, requires_grad=True), init_device_mesh("cpu", (world_size,))
    shard = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])
    with CollectiveCounter() as forward:
        y = Known.apply(x).sum()
    with CollectiveCounter() as backward:
        y.backward()
    with CollectiveCounter() as alone_counter:
        dist.all_reduce(torch.ones(3), group=alone)
    with CollectiveCounter() as dtensor:
        shard.redistribute(placements=[Replicate()]).to_local()
    with (
        pytest.raises(ValueError, match="broadcast_: only all-reduce, all-gather, reduce-scatter, reduce have a ring formula"),
        CollectiveCounter(),
    ):
        dist.broadcast(torch.ones(2), src=0)
    return [(dict(c.calls), dict(c.sent_bytes)) for c in (forward, backward, alone_counter, dtensor)]


def test_the_counter_counts() -> None:
    for counted in run_ranks(count_known, 2):
        assert counted == [
            ({"all-reduce": 1}, {"all-reduce": 96}),  # twice half of it
            ({"all-gather": 1, "reduce-scatter": 1}, {"all-gather": 96, "reduce-scatter": 96}),
            ({}, {}),
            ({"all-gather": 1}, {"all-gather": 48}),
        ]


def test_there_is_no_number_of_bytes_that_is_not_exact() -> None:
    assert ring_bytes("all-reduce", 96, 4) == 144
    with pytest.raises(ValueError, match="all-gather of 10 bytes over 4 ranks: parts must be equal"):
        ring_bytes("all-gather", 10, 4)


def install_doubled(model: Any, tp: int) -> Step:
    """Computes twice the loss."""
    step = install_dtensor(model, tp)
    return replace(step, forward=lambda tokens: 2 * step.forward(tokens))


def install_uneven(model: Any, tp: int) -> Step:
    """Has a fourth layer that costs more than the others."""
    step = install_dtensor(model, tp)
    extra = torch.ones(8) if len(model.model.layers) == 4 else None

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        if extra is not None:
            dist.all_reduce(extra)
        return step.forward(tokens)

    return replace(step, forward=forward)


def measure_wrong(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=r"doubled with 2 layers over 2 ranks: loss: relative error 1\.0e\+00 against one process"):
        measure_rank(rank, world_size, [System("doubled", install_doubled)], [HEADS], quiet)
    with pytest.raises(
        ValueError, match=r"uneven: layer 3 costs 2 all-reduce .*; layer 4 costs 3 all-reduce .*: no cost per layer"
    ):
        measure_rank(rank, world_size, [System("uneven", install_uneven)], [HEADS], quiet)


def test_a_system_that_computes_something_else_is_not_counted() -> None:
    run_ranks(measure_wrong, 2)
    layer = torch.nn.Linear(4, 2, bias=False)
    layer.weight.grad = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"weight: shape \[2, 4\] instead of \[4, 4\]"):
        Truth(1.0, {"weight": torch.ones(4, 4)}).check(torch.tensor(1.0), layer, 0, 2)


# ---------------------------------------------------------------------- the command


def made_up() -> list[Row]:
    """Rows as if counted: the first system as the formula says, the last with one call more where queries are grouped."""
    expected = expected_traffic(2, False)
    more = LayerTraffic({"all-reduce": 3}, expected.backward, expected.sent_bytes + 8)
    row = Row("as the formula", 2, 8, expected, expected, is_ours=True)
    return [row, replace(row, kv_heads=4), replace(row, system="more"), replace(row, system="more", kv_heads=4, counted=more)]


def test_equal_lines_are_given_once() -> None:
    names = [line[1] for line in lines(made_up())]
    assert names == [
        "formula, tensor parallel",
        "formula, sequence parallel",
        "as the formula",
        "more, 8 key heads",
        "more, 4 key heads",
    ]


@pytest.mark.parametrize(("flags", "render"), [([], render_table), (["--json"], render_json), (["--markdown"], render_markdown)])
def test_the_exit_code_says_whether_ours_equals_the_formula(
    flags: list[str], render: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.communication.measure", made_up)
    assert main(flags) == 1
    output = capsys.readouterr()
    assert output.out == render(made_up()) + "\n"
    assert "more, tp2, 4 key and value heads: counted 3 all-reduce forward, 2 all-reduce backward" in output.err
    monkeypatch.setattr("benchmarks.communication.measure", lambda: made_up()[:2])
    assert main(flags) == 0
    assert "lightning_par equals the formula" in capsys.readouterr().err


def test_json_has_every_row() -> None:
    rows = json.loads(render_json(made_up()))["rows"]
    assert [row["kv_heads"] for row in rows] == [8, 4, 8, 4]


def test_its_page_shows_measured_lines() -> None:
    measured = (ROOT / "benchmarks" / "RESULTS.md").read_text().splitlines()
    shown = re.findall(r"^\| (?:2|4) \| .*\|$", (ROOT / "docs" / "communication.md").read_text(), re.MULTILINE)
    assert f"| {' | '.join(HEADINGS)} |" in measured
    assert len(shown) >= len(OURS) and set(shown) <= set(measured)
    for system in SYSTEMS:
        assert any(f"| {system.name} |" in line for line in measured), f"{system.name} is not in RESULTS.md"
