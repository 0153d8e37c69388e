"""The benchmark of ZeRO: what its table says, and that every system in it computes the same."""

from __future__ import annotations

import json

import pytest

from benchmarks import replica_table, zero
from benchmarks.replica_pace import Row
from benchmarks.replicas import SYSTEMS

OURS = Row("lightning_par", 2, (0.4, 0.3, 0.5), (0.2, 0.3))
DEEPSPEED = Row("DeepSpeed", 2, (0.6, 0.8, 0.7), (0.4,))
DDP = Row("DDP", 0, (0.5,), (0.5,))
WRONG = Row("FSDP2", 3, wrong="the losses are [1.0], and [2.0] in one process")


def test_the_table_compares_with_deepspeed_at_the_same_stage() -> None:
    lines = replica_table.lines([DEEPSPEED, DDP, OURS])
    assert [line[:2] for line in lines] == [
        ("nothing", "DDP"),
        ("and gradients (2)", "lightning_par"),
        ("and gradients (2)", "DeepSpeed"),
    ]
    assert lines[1][2:] == ("300.0", "400.0", "0.50", "0.57", "200.0", "0.50")
    assert lines[0][4:] == ("", "", "500.0", "")


def test_a_system_that_computes_something_else_has_no_times_and_ends_with_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [OURS, DEEPSPEED, WRONG]
    monkeypatch.setattr(zero, "measure", lambda quick: rows)
    assert zero.main([]) == 1
    printed = capsys.readouterr()
    assert "FSDP2, zero3: the losses are [1.0], and [2.0] in one process" in printed.err
    assert "wrong" in printed.out
    rows.pop()
    assert zero.main(["--markdown"]) == 0
    assert "| and gradients (2) | lightning_par | 300.0 | 400.0 | 0.50 |" in capsys.readouterr().out
    assert zero.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["seconds"] == [0.6, 0.8, 0.7]


@pytest.mark.slow
def test_every_system_computes_what_one_process_does() -> None:
    rows = zero.measure(quick=True)
    assert not [row for row in rows if row.wrong]
    assert {(row.system, row.zero) for row in rows} == {(system.name, system.zero) for system in SYSTEMS}
