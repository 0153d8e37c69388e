"""The published runs: they are what their sources say, and their forecasts make a table."""

from __future__ import annotations

import json

import pytest

from benchmarks.published import main
from benchmarks.published_forecast import Row
from benchmarks.published_runs import KORTHIKANTI, NARAYANAN, published_runs
from benchmarks.published_table import lines, mean_error, render_json, render_markdown, render_table


def test_the_runs_are_those_of_their_sources() -> None:
    """Devices, samples of a step, and parameters as the tables of the papers give them."""
    runs = {run.name: run for run in published_runs()}
    devices = [run.layout.world_size for run in runs.values()]
    assert devices == [8, 8, 64, 64, 280, 280, 512, 512, 8, 128, 32, 64, 128, 256, 512, 1024, 1536, 1920, 2520, 3072]
    samples = [(run.batch or (run.layout.microbatches or 0) * run.rows) * (run.layout.dp or 0) for run in runs.values()]
    assert samples[:10] == [4, 4, 64, 64, 280, 280, 512, 512, 16, 256]
    assert samples[10:] == [512, 512, 512, 1024, 1536, 1792, 2304, 2160, 2520, 3072]
    billions = [12 * run.sizes["n_embd"] ** 2 * run.sizes["n_layer"] / 1e9 for run in runs.values() if run.source == KORTHIKANTI]
    assert [round(each) for each in billions[::2]] == [22, 174, 528, 1007]


def test_table_1_is_what_its_equations_make_of_it() -> None:
    """Parameters by equation 2 of arXiv 2104.04473 are those of the names; its example: 84 days for 450 billion tokens of 1T."""
    runs = [run for run in published_runs() if run.source == NARAYANAN]
    for run in runs:
        hidden, layers = run.sizes["n_embd"], run.sizes["n_layer"]
        parameters = 12 * layers * hidden**2 * (1 + 13 / (12 * hidden) + (51_200 + 2048) / (12 * layers * hidden))
        assert parameters / 1e9 == pytest.approx(float(run.name.removeprefix("GPT ").removesuffix("B")), abs=0.06)
    tokens_per_second = 3072 * 2048 / runs[-1].seconds
    assert 450e9 / tokens_per_second / 86_400 == pytest.approx(84, abs=1)


def test_errors_are_a_fraction_of_what_was_published() -> None:
    first, second = published_runs()[:2]
    rows = [
        Row(first, first.layout, 1.2 * first.seconds, {"compute": 1.0}),
        Row(second, second.layout, 0.9 * second.seconds, {"compute": 1.0}),
    ]
    assert mean_error(rows) == pytest.approx(0.15)
    assert [line[-1] for line in lines(rows)] == ["+20.0%", "-10.0%"]
    assert "mean error 15.0%" in render_table(rows) and "| +20.0% |" in render_markdown(rows)
    assert [entry["error"] for entry in json.loads(render_json(rows))] == pytest.approx([0.2, -0.1])


def test_help_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "published runs" in capsys.readouterr().out
