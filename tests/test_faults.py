"""The command that kills ranks: its table, its exit code, and a few of its runs."""

import json
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.fault import NUM_RANKS, Kill, Outcome, draw_kills
from benchmarks.fault_table import HEADINGS, lines_of, render_json, render_markdown, render_table
from benchmarks.fault_table import faults as faults_of

GOOD = Outcome(Kill(1, 5, 0.02), "saving", 1.25, 9.0, 0, True, True)
BAD = Outcome(Kill(2, 7, 0.03), "stepping", None, None, 2, False, False)


def test_a_run_that_does_not_survive_is_in_the_table_and_in_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lines_of([GOOD, BAD]) == [
        ("saving", "1", "0", "0", "0", "0", "1.2", "1.2", "9.0", "9.0"),
        ("stepping", "1", "1", "2", "1", "1", "", "", "", ""),
        ("all", "2", "1", "2", "1", "1", "1.2", "1.2", "9.0", "9.0"),
    ]
    assert faults_of([GOOD]) == []
    assert faults_of([GOOD, BAD]) == [
        "1 runs in which ranks were left after 30 s",
        "2 checkpoints that cannot be read",
        "1 runs that did not go on",
        "1 runs that learned something else",
    ]
    for outcomes, code in (([GOOD], 0), ([GOOD, BAD], 1)):
        monkeypatch.setattr(faults, "measure", lambda runs, seed, outcomes=outcomes: outcomes)
        assert faults.main([]) == code
    assert "every run has survived" in capsys.readouterr().err


def test_the_result_is_printed_in_each_form() -> None:
    assert "2 runs in tp2_pp2_mb2, one rank killed in each" in render_table([GOOD, BAD])
    assert f"| {' | '.join(HEADINGS)} |" in render_markdown([GOOD])
    assert json.loads(render_json([BAD]))[0]["kill"] == {"rank": 2, "step": 7, "seconds": 0.03}


def test_draws_are_the_same_for_the_same_seed_and_reach_every_rank() -> None:
    draws = draw_kills(0, 50)
    assert draw_kills(0, 5) == draws[:5] != draw_kills(1, 5)
    assert {kill.rank for kill in draws} == set(range(NUM_RANKS))
    assert {kill.step // 15 for kill in draws} == {0, 1, 2, 3}, "of 60 steps"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_survive(tmp_path: Path) -> None:
    assert faults.main(["--runs", "3"]) == 0
