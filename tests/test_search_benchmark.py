"""The benchmark of the search: a small model timed, its table, and what makes it fail."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import search_pace
from benchmarks.search import main
from benchmarks.search_pace import SIZES, Row, time_searches
from benchmarks.search_table import lines, render_json, render_markdown, render_table

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 256,
}  # fmt: skip
ROW = Row("405B", 16_384, 2048, 21.4, 0.61, 180, "parallel=tp8_sp_pp8_vp8_zero1_mb8")


@pytest.mark.slow
def test_a_search_is_timed_apart_from_the_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_pace, "_LENGTH", 32)
    first, second = time_searches([("tiny", SMALL)], [(1, 8), (2, 16)])
    assert first.num_devices == 8 and second.batch == 16 and first.best.startswith("parallel=") and first.num_considered > 10
    assert first.analysis_seconds > second.analysis_seconds >= 0 and 0 < first.search_seconds < first.analysis_seconds


def test_the_table_says_what_was_searched() -> None:
    assert lines([ROW]) == [("405B", "parallel=tp8_sp_pp8_vp8_zero1_mb8", "16,384", "2,048", "180", "21.4", "0.61")]
    assert "16,384" in render_table([ROW]) and "| 0.61 |" in render_markdown([ROW])
    assert json.loads(render_json([ROW]))[0]["search_seconds"] == 0.61
    assert "nothing fits" in lines([Row("405B", 32, 512, 1.0, 0.1, 0, "")])[0]


def test_a_slow_search_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        search_pace, "time_searches", lambda models, sizes: [Row("405B", 16_384, 2048, 1.0, 1.5, 180, "parallel=dp")]
    )
    assert main([]) == 1
    assert "405B on 16,384 devices: 1.50 s" in capsys.readouterr().err
    assert SIZES[-1][0] * 8 == 16_384


def test_help_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "16,384 H100" in capsys.readouterr().out
