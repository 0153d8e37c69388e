"""The benchmark of one GPU: its table, what it holds against what, and that its systems train alike (on a CPU, and smaller)."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_pace, gpu_table
from benchmarks.gpu_pace import CASES, LIGHTNING, OURS, TORCH, Row, differences, read_kernels
from tests.ranks import run_ranks

ROWS = [
    Row(TORCH, "plain", (0.2, 0.1, 0.2), 10 << 30, 12 << 30, 0, 900, 0.25, 10.0),
    Row(OURS, "plain", (0.1, 0.2), 11 << 30, 12 << 30, 22 << 29, 1000, 0.5, 10.1),
    Row(OURS, "compiled", error="no compiler"),
    Row(OURS, "plain", (0.1,), 11 << 30, 12 << 30, 22 << 29, 1000, 0.5, 10.1),
]


def test_rows_are_held_against_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_table, "_gpu_name", lambda: "NVIDIA H200")
    first, second, failed = gpu_table.lines(ROWS)
    flops = (6 * 1144.5e6 + 12 * 21 * 2048 * 2048) * 16384
    assert gpu_pace.flops_of_step() == pytest.approx(flops, rel=1e-4)
    assert first[:5] == ("plain", TORCH, "200.0", "100.0", "") and first[9:] == ("900", "25.0", "10.00", "", "", "")
    assert second[2:5] == ("100.0", "100.0", "0.500") and second[9:] == ("1,000", "50.0", "11.00", "1.100", "11.00", "+0.0%")
    assert first[6] == f"{flops / 0.2 / 1e12:.0f}" and second[5] == f"{8 * 2048 / 0.1:,.0f}"
    causal = (6 * 1144.5e6 + 6 * 21 * 2048 * 2048) * 16384
    assert first[7:9] == (f"{flops / 0.2 / 989e10:.1f}", f"{causal / 0.2 / 989e10:.1f}")
    assert failed[2] == "failed" and len(failed) == len(gpu_table.HEADINGS)
    assert "NVIDIA H200" in gpu_table.render_markdown(ROWS) and "lightning_par" in gpu_table.render_table(ROWS)
    assert json.loads(gpu_table.render_json(ROWS))["rows"][0]["peak"] == 10 << 30
    monkeypatch.setattr(gpu_table, "_gpu_name", lambda: "NVIDIA X")
    assert gpu_table.lines(ROWS)[0][7:9] == ("", "")  # no rate, no MFU


def test_what_is_wrong() -> None:
    assert differences(ROWS) == [f"{OURS}, compiled: no compiler"]
    far = Row(OURS, "plain", (0.1,), loss=10.3)
    assert differences([ROWS[0], far]) == [f"{OURS}, plain: the loss is 10.3, and 10.0 in {TORCH}"]


def test_time_without_a_kernel() -> None:
    def event(name: str, start: float, end: float, kind: str = "CUDA") -> Any:
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name=kind), time_range=SimpleNamespace(start=start, end=end))

    events = [event("b", 4, 6), event("a", 0, 3), event("Memcpy DtoH", 5, 8), event("host", 0, 10, "CPU"), event("c", 9, 10)]
    kernels, idle = read_kernels(events)
    assert (kernels, idle) == (2, pytest.approx(0.2))  # 3 in two steps; of 10 nothing runs from 3 to 4 and from 8 to 9
    assert read_kernels([]) == (0, 0.0)


def measure_on_cpu(rank: int, world_size: int) -> list[Row]:
    """The ways that need no compiler, on a CPU."""
    cuda: Any = torch.cuda
    cuda.synchronize, cuda.max_memory_allocated, cuda.max_memory_reserved = (lambda *args: 1,) * 3
    small = dict(WIDTH=64, INNER=96, DEPTH=2, HEADS=4, VOCABULARY=128, LENGTH=32, ROWS=4, DEVICE="cpu")
    for name, value in small.items():
        setattr(gpu_pace, name, value)
    return [gpu_pace.measure_case(0, 1, case, gpu_pace.make_decoder(), 4) for case in CASES if not case.compiles]


def test_its_systems_train_alike() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    (rows,) = run_ranks(measure_on_cpu, 1)
    assert {row.system for row in rows} == {TORCH, LIGHTNING, OURS} and len(rows) == 8
    assert all(len(row.seconds) == 4 for row in rows)
    assert all((row.foreseen > 0) == (row.system == OURS) for row in rows)
    assert differences(rows) == []


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_DRIVER", ())
    assert gpu.main([]) == 0
    assert "skipped: this machine has no NVIDIA GPU" in capsys.readouterr().err


def test_help_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    assert "python -m benchmarks.gpu" in capsys.readouterr().out
