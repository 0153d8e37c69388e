"""Runs whose ranks are started again: when, how often, and what they go on from."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_par.errors import ConfigurationError
from lightning_par.host.launch.record import RUN, Attempt, Record
from lightning_par.host.option import check_max_restarts
from tests.test_launcher import ENVIRONMENT, ROOT, finish, start, wait_until_gone

pytestmark = pytest.mark.alone


def ranks_of(folder: Path, start: int = 0, within: float = 20) -> list[int]:
    """Process ids of a start's ranks, once all are there."""
    deadline = time.monotonic() + within
    while len(found := sorted((folder / str(start)).glob("[0-9]"))) < 3:
        assert time.monotonic() < deadline, f"only {found} started"
        time.sleep(0.02)
    return [int(path.read_text().split()[0]) for path in found]


def starts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def name_of(rank: int) -> str:
    return f"rank {rank} (pp 0, dp 0, tp {rank})"


# ------------------------------------------------------------------ when ranks are started again


@pytest.mark.parametrize("rank", range(3))
def test_after_any_rank_was_killed_all_are_started_again(rank: int, tmp_path: Path) -> None:
    cases = ["wait; return"] * 3
    cases[rank] = "die; return"
    code, errors = finish(start(tmp_path, *cases, "2"))
    assert code == 0
    assert errors.splitlines() == [f"lightning_par: {name_of(rank)} was killed by SIGKILL: ending all ranks"]
    assert starts(tmp_path) == ["0", "1"]
    assert sorted(path.name for path in tmp_path.glob("1/*.done")) == ["0.done", "1.done", "2.done"]
    wait_until_gone(ranks_of(tmp_path, 0))
    assert {path.read_text().split(" ", 2)[2] for path in tmp_path.glob("[01]/[0-9]")} == {"29500 0 3"}


def test_ranks_that_ignore_a_polite_signal_are_started_again_too(tmp_path: Path) -> None:
    code, _ = finish(start(tmp_path, "stubborn; return", "die; return", "stubborn; return", "1"))
    assert code == 0
    wait_until_gone(ranks_of(tmp_path, 0))


def test_it_is_tried_so_often_and_no_more(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "wait", "wait", "die", "2"))
    assert code == 1
    assert errors.count(f"{name_of(2)} was killed by SIGKILL: ending all ranks") == 3
    assert starts(tmp_path) == ["0", "1", "2"]
    wait_until_gone(ranks_of(tmp_path, 2))


def test_what_raises_before_any_step_is_not_tried_again(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "wait", "raise; return", "wait", "2"))
    assert code == 1
    assert f"{name_of(1)} raised RuntimeError: raised on purpose: ending all ranks" in errors
    assert errors.count("Traceback") == 1
    assert starts(tmp_path) == ["0"]


def test_what_raises_after_a_step_is_tried_again_before_one_too(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "step wait; wait; return", "raise later; raise; return", "wait; wait; return", "2"))
    assert code == 0
    assert errors.count("raised RuntimeError: raised on purpose: ending all ranks") == 2
    assert starts(tmp_path) == ["0", "1", "2"]


def test_a_loss_that_is_undefined_is_not_tried_again(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "step wait", "raise undefined; return", "wait", "2"))
    assert code == 1
    assert f"{name_of(1)} raised NumericsError: raised on purpose: ending all ranks" in errors
    assert starts(tmp_path) == ["0"]


def test_a_configuration_that_cannot_work_is_not_tried_again(tmp_path: Path) -> None:
    code, _ = finish(start(tmp_path, "step misconfigured", "wait", "wait", "2"))
    assert code == 2
    assert starts(tmp_path) == ["0"]


def test_a_rank_that_does_not_answer_is_a_reason_to_start_again(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "wait; return", "stop; return", "wait; return", "1"))
    assert code == 0
    assert f"{name_of(1)} has not answered for 1 s: ending all ranks" in errors


def test_what_cannot_work_is_found_by_the_supervisor(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "refuse", "return", "return", "2"))
    assert code == 1
    assert errors.splitlines()[-1].endswith("LayoutError: refused before any process")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ signals to the supervisor


def test_sigterm_before_training_ends_all_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "wait", "wait", "wait", "2")
    pids = ranks_of(tmp_path)
    process.send_signal(signal.SIGTERM)
    code, _ = finish(process, within=5)
    assert code == 128 + signal.SIGTERM
    assert starts(tmp_path) == ["0"]
    wait_until_gone(pids)


def test_ranks_that_stop_politely_end_the_run_well(tmp_path: Path) -> None:
    process = start(tmp_path, *["stop politely"] * 3, "2")
    ranks_of(tmp_path)
    time.sleep(0.3)  # until each has its handler
    os.killpg(process.pid, signal.SIGTERM)  # to all of them, and passed on to all: it counts once
    assert finish(process, within=5) == (0, "")
    assert starts(tmp_path) == ["0"]


def test_a_second_sigterm_ends_ranks_that_do_not_heed_the_first(tmp_path: Path) -> None:
    process = start(tmp_path, *["stubborn"] * 3, "2")
    pids = ranks_of(tmp_path)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, _ = finish(process, within=5)
    assert code == 128 + signal.SIGTERM
    wait_until_gone(pids)


@pytest.mark.parametrize("to_all", [True, False])
def test_ctrl_c_is_not_a_reason_to_start_again(to_all: bool, tmp_path: Path) -> None:
    process = start(tmp_path, "wait", "stubborn", "wait", "2")
    pids = ranks_of(tmp_path)
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    code, _ = finish(process, within=10)
    assert code == 1
    assert starts(tmp_path) == ["0"]
    wait_until_gone(pids)


def test_without_their_supervisor_ranks_end(tmp_path: Path) -> None:
    process = start(tmp_path, "wait", "stubborn", "wait", "2")
    pids = ranks_of(tmp_path)
    process.kill()
    finish(process)
    wait_until_gone(pids)


# ------------------------------------------------------------------ Hydra


def hydra(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests" / "launched_hydra.py"), *words]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


def test_ranks_started_again_have_the_same_output_folder(tmp_path: Path) -> None:
    result = hydra(tmp_path, "ranks=2", "max_restarts=1", "die=true", "hydra.run.dir=out/${now:%f}")
    assert result.returncode == 0, result.stderr
    assert "rank 1 (pp 0, dp 0, tp 1) was killed by SIGKILL: ending all ranks" in result.stderr
    (folder,) = (tmp_path / "out").iterdir()
    assert {path.name for path in folder.glob("rank-*")} == {"rank-0", "rank-1"}
    assert (folder / "rank-0").read_text().endswith("| launched_hydra"), "the log has the name that it has without restarts"
    assert (folder / ".hydra").is_dir()


def test_a_sweep_is_not_supervised(tmp_path: Path) -> None:
    result = hydra(tmp_path, "--multirun", "ranks=2", "max_restarts=1")
    assert result.returncode == 2
    assert "max_restarts=1 does not go with --multirun, whose process runs the other jobs too: start each job by" in result.stderr


def test_ranks_that_are_there_already_are_not_supervised(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_par.host.launch import launcher

    made = object.__new__(launcher.launcher_class("pytorch_lightning"))
    made._max_restarts = 2
    monkeypatch.setattr(launcher._RankLauncher, "_current", object())
    with pytest.raises(
        ConfigurationError, match="max_restarts=2: an earlier Trainer of this script has started ranks already: give"
    ):
        made._supervise()


def test_who_has_started_the_ranks_starts_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_par.host.launch.launcher import launcher_class

    made = object.__new__(launcher_class("pytorch_lightning"))
    made._max_restarts, made._preflight, made._meet = 2, None, None
    made.num_processes, made.num_nodes, made.root = 1, 1, "pytorch_lightning"
    made.cluster_environment = SimpleNamespace(creates_processes_externally=True, validate_settings=lambda **_: None)
    with pytest.warns(UserWarning, match="max_restarts=2 is ignored: ranks are started again by who has started them: give --max"):
        assert made.launch(lambda: "done") == "done"


# ------------------------------------------------------------------ the number


def test_the_number_of_restarts_is_checked() -> None:
    assert check_max_restarts(3) == 3
    for wrong in (-1, 1.5, "2"):
        with pytest.raises(ConfigurationError, match=r"how often ranks are started again: use 0, 1, 2 and so on"):
            check_max_restarts(wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------ what a run goes on from


def test_the_record_outlives_the_ranks_that_write_it(tmp_path: Path) -> None:
    record = Record(tmp_path)
    assert not record.has_stepped
    assert record.saves_of(0) == []
    record.note_step()
    for fit, name in ((0, "a b"), (0, "last"), (1, "other"), (0, "c\nd"), (0, "last")):
        record.note_save(fit, tmp_path / name)
    read = Record(tmp_path)
    assert read.has_stepped
    assert [path.name for path in read.saves_of(0)] == ["last", "c\nd", "a b"]
    assert [path.name for path in read.saves_of(1)] == ["other"]


def save(path: Path, step: int) -> Path:
    from lightning_par.checkpoint import Content, Saver, Share, take_apart

    Saver(None, False).save(path, Content("single", Share(), take_apart({"trainer": {"global_step": step}, "run": {}})))
    return path


def begin(folder: Path, restart: int, after: str = "", speaks: bool = True, fits: int = 1, **given: Any) -> Any:
    from lightning_par.host.launch.restart import Run

    def fit_impl(model: Any, loader: Any = None, ckpt_path: Any = None, weights_only: Any = None) -> None: ...

    run = Run(Attempt(str(folder), restart, 3, after))
    for _ in range(fits):
        result = run.begin_fit(fit_impl, ("model", "loader", given.get("ckpt_path"), None), {}, speaks)
    return result


def test_a_run_goes_on_from_its_newest_good_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = Record(tmp_path)
    for name, step in (("a", 10), ("b", 30), ("damaged", 40), ("last", 20)):
        record.note_save(0, save(tmp_path / name, step))
    record.note_save(0, tmp_path / "killed in its first save")
    record.note_save(1, save(tmp_path / "of another fit", 50))
    (tmp_path / "damaged" / "trainer.json").write_text("{")
    args, kwargs = begin(tmp_path, 1, "rank 2 was killed by SIGKILL", ckpt_path="the user's")
    assert (args, kwargs) == (("model", "loader", str(tmp_path / "b"), None), {})
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith(f"lightning_par: {tmp_path / 'damaged'} is left out: ")
    assert said[1:] == [f"lightning_par: restart 1 of 3 after rank 2 was killed by SIGKILL: going on from {tmp_path / 'b'}"]
    assert begin(tmp_path, 1, fits=2)[0][2] == str(tmp_path / "of another fit")


def test_a_checkpoint_that_was_being_replaced_counts(tmp_path: Path) -> None:
    Record(tmp_path).note_save(0, save(tmp_path / "last.ckpt", 10))
    (tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.earlier")
    assert begin(tmp_path, 1)[0][2] == str(tmp_path / "last.ckpt")


def test_a_run_that_has_saved_nothing_starts_as_at_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert begin(tmp_path, 2, ckpt_path="the user's")[0][2] == "the user's"
    assert capfd.readouterr().err == "lightning_par: restart 2 of 3: starting as at first, as no checkpoint was saved\n"
    Record(tmp_path).note_save(0, save(tmp_path / "a", 10))
    assert begin(tmp_path, 0, ckpt_path="the user's")[0][2] == "the user's", "the first start"
    begin(tmp_path, 1, speaks=False)
    assert capfd.readouterr().err == ""


def attempt_in_a_rank(code: str, **environment: str) -> str:
    program = f"from lightning_par.host.launch.record import this_attempt\nattempt = this_attempt()\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", program], env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_a_program_that_a_rank_starts_is_no_rank(tmp_path: Path) -> None:
    words = Attempt(str(tmp_path), 1, 2, "rank 1 was killed by SIGKILL").words()
    code = "import os; print(attempt.after, attempt.restart, 'LIGHTNING_PAR_RUN' in os.environ, this_attempt() is attempt)"
    assert attempt_in_a_rank(code, **words) == "rank 1 was killed by SIGKILL 1 False True"
    assert json.loads(words[RUN])["max_restarts"] == 2
    assert attempt_in_a_rank("print(attempt)") == "None"


def test_under_torchrun_the_first_start_of_a_run_has_an_empty_record(tmp_path: Path) -> None:
    torchrun = {
        "TORCHELASTIC_MAX_RESTARTS": "2",
        "TORCHELASTIC_RUN_ID": "a/b",
        "LOCAL_RANK": "0",
        "TMPDIR": str(tmp_path),
    }
    folder = tmp_path / f"lightning_par-{os.getuid()}-a_b-{os.getpid()}"
    touch = "import pathlib; pathlib.Path(attempt.folder, 'stepped').touch(); print(attempt.folder)"
    for _ in range(2):
        assert attempt_in_a_rank(touch, **torchrun, TORCHELASTIC_RESTART_COUNT="0") == str(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "saves").touch()
    assert attempt_in_a_rank("print(attempt.restart)", **torchrun, TORCHELASTIC_RESTART_COUNT="1") == "1"
    assert sorted(path.name for path in folder.iterdir()) == ["saves", "stepped"]
    assert attempt_in_a_rank("print(attempt)", **{**torchrun, "TORCHELASTIC_MAX_RESTARTS": "0"}) == "None"


def test_nothing_of_a_run_is_left_in_the_folder_for_temporary_files(tmp_path: Path) -> None:
    before = set(Path(tempfile.gettempdir()).glob("lightning_par-run-*"))
    finish(start(tmp_path, *["return"] * 3, "1"))
    assert set(Path(tempfile.gettempdir()).glob("lightning_par-run-*")) <= before
