"""The benchmark of ZeRO: what its table says, and that every system in it computes the same."""

from __future__ import annotations

import json

import pytest

from benchmarks import zero
from benchmarks.contest import Row
from benchmarks.replica_table import TABLE

OURS = Row("lightning_par", "dp2_zero2", (0.4, 0.3, 0.5), (0.2, 0.3))
DEEPSPEED = Row("DeepSpeed", "dp2_zero2", (0.6, 0.8, 0.7), (0.4,))
DDP = Row("DDP", "dp2_zero0", (0.5,), (0.5,))
WRONG = Row("FSDP2", "dp2_zero3", wrong="the losses are [1.0], and [2.0] in one process")


def test_the_table_compares_with_deepspeed_at_the_same_stage() -> None:
    lines = TABLE.lines([DDP, DEEPSPEED, OURS])
    assert [line[:2] for line in lines] == [
        ("dp2_zero0", "DDP"),
        ("dp2_zero2", "lightning_par"),
        ("dp2_zero2", "DeepSpeed"),
    ]
    assert lines[1][2:] == ("300.0", "400.0", "0.50", "0.57", "200.0", "0.50")
    assert lines[0][4:] == ("", "", "500.0", "")


def test_a_system_that_computes_something_else_has_no_times_and_ends_with_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [OURS, DEEPSPEED, WRONG]
    monkeypatch.setattr(zero, "measure", lambda effort: rows)
    assert zero.main([]) == 1
    printed = capsys.readouterr()
    assert "FSDP2, dp2_zero3: the losses are [1.0], and [2.0] in one process" in printed.err
    assert "wrong" in printed.out
    rows.pop()
    assert zero.main(["--markdown"]) == 0
    assert "| dp2_zero2 | lightning_par | 300.0 | 400.0 | 0.50 |" in capsys.readouterr().out
    assert zero.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["seconds"] == [0.6, 0.8, 0.7]
