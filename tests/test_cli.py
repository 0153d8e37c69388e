"""The command line, run inside the test's process."""

import re
import sys
from pathlib import Path

import pytest

from lightning_par import __version__, cli
from lightning_par.host.launch.command import MAIN

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-par"])
    monkeypatch.setenv(MAIN, "")  # so that it is forgotten again


def test_explain_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["explain", "-cd", str(ROOT / "recipes"), "-cn", "demo", "parallel=tp2_pp4", "data.batch_size=8"])
    output = capsys.readouterr().out
    assert "LanguageModel as tp2_pp4_mb8 on 8 ranks: tp 2 x pp 4 x dp 1" in output
    assert "├─ embedding " in output and "vocabulary: 256/2 x 128" in output
    # four equal blocks but for the head, which makes the last stage the dearest
    assert re.search(
        r"Schedule 1f1b: by the FLOPs of the stages, ranks wait (2[89]|3\d)\.\d% of a step .* up to 4 microbatches", output
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["parallel=tp2", "trainer.devices=3"],
            r"parallel=tp2 needs a multiple of 2 processes \(tp 2 x pp 1\), the trainer has 3 ",
        ),
        (["parallel=tp3"], "tp3"),
        (["parallel=pp2", "plan={splitt: 1}"], "splitt"),
    ],
)
def test_explain_says_what_cannot_work(overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["explain", *overrides])
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert re.search(message, errors)
    assert "Traceback" not in errors


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    assert "explain" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__
