"""The benchmark of one GPU: its table, what it holds against what, and that its systems train alike (on a CPU, and smaller)."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from benchmarks import device, device_pace, device_table
from benchmarks.device_pace import CASES, LIGHTNING, OURS, Row, differences
from tests.ranks import run_ranks

ROWS = [
    Row(LIGHTNING, "plain", (0.2, 0.1, 0.2), 10 << 30, 12 << 30, 0, 10.0),
    Row(OURS, "plain", (0.1, 0.2, 0.1), 11 << 30, 12 << 30, 22 << 29, 10.1),
    Row(OURS, "compiled", error="no compiler"),
]


def test_rows_are_held_against_lightnings_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_table, "_gpu_name", lambda: "NVIDIA X")
    first, second, failed = device_table.lines(ROWS)
    assert first[:4] == ("plain", LIGHTNING, "200.0", "") and first[6:] == ("10.00", "", "", "")
    assert second[2:4] == ("100.0", "0.500") and second[6:] == ("11.00", "1.100", "11.00", "+0.0%")
    assert device_pace.flops_of_step() == pytest.approx((6 * 682.1e6 + 12 * 12 * 2048 * 2048) * 16384, rel=1e-4)
    assert (first[5], second[5]) == ("385", "769") and second[4] == f"{8 * 2048 / 0.1:,.0f}"
    assert failed[2] == "failed" and len(failed) == len(device_table.HEADINGS)
    assert "NVIDIA X" in device_table.render_markdown(ROWS) and "lightning_par" in device_table.render_table(ROWS)
    assert json.loads(device_table.render_json(ROWS))["rows"][0]["peak"] == 10 << 30


def test_what_is_wrong() -> None:
    assert differences(ROWS) == [f"{OURS}, compiled: no compiler"]
    far = Row(OURS, "plain", (0.1,), loss=10.3)
    assert differences([ROWS[0], far]) == [f"{OURS}, plain: the loss is 10.3, and 10.0 in {LIGHTNING}"]


def measure_on_cpu(rank: int, world_size: int) -> list[Row]:
    """The ways that need no compiler, on a CPU."""
    cuda: Any = torch.cuda
    cuda.synchronize, cuda.max_memory_allocated, cuda.max_memory_reserved = (lambda *args: 1,) * 3
    for name, value in dict(WIDTH=64, INNER=96, DEPTH=2, HEADS=4, VOCABULARY=128, LENGTH=32, ROWS=4).items():
        setattr(device_pace, name, value)
    trainer = pl.Trainer
    pl.Trainer = lambda **options: trainer(**{**options, "accelerator": "cpu"})  # type: ignore[misc, assignment]
    rows = []
    for case in CASES:
        if not case.compiles:
            rows.append(device_pace.measure_case(0, 1, case, device_pace.make_decoder(), 4))
    return rows


def test_its_systems_train_alike() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    (rows,) = run_ranks(measure_on_cpu, 1)
    assert {row.system for row in rows} == {LIGHTNING, OURS} and len(rows) == 8
    assert all(len(row.seconds) == 4 for row in rows)
    assert all((row.foreseen > 0) == (row.system == OURS) for row in rows)
    assert differences(rows) == []


def test_help_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        device.main(["--help"])
    assert "python -m benchmarks.device" in capsys.readouterr().out
