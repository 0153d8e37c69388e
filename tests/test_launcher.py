"""Processes of a run: started once, ended together, never left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")}
ENVIRONMENT["PYTHONPATH"] = str(ROOT)

pytestmark = pytest.mark.alone


def start(folder: Path, *cases: str) -> subprocess.Popen[str]:
    """Three ranks that do what ``cases`` say, in a session of their own so that a signal can go to all of them."""
    command = [sys.executable, str(ROOT / "tests" / "launched.py"), str(folder), *cases]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_heed_interrupts
    )


def _heed_interrupts() -> None:
    """A shell starts what it runs in the background deaf to Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[str], within: float = 20) -> tuple[int, str]:
    """Exit code and standard error of the first rank."""
    _, errors = process.communicate(timeout=within)
    return process.returncode, errors


def ranks(folder: Path, count: int = 3, within: float = 20) -> list[int]:
    """Process ids, once all ranks have started."""
    deadline = time.monotonic() + within
    while len(found := sorted(folder.glob("[0-9]"))) < count:
        assert time.monotonic() < deadline, f"only {found} started"
        time.sleep(0.02)
    return [int(path.read_text().split()[0]) for path in found]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"  # a dead one that its new parent has not noticed
    except OSError:
        return False


def wait_until_gone(pids: list[int], within: float = 5) -> None:
    deadline = time.monotonic() + within
    while alive := [
        pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    ]:
        assert time.monotonic() < deadline, f"{alive} are left"
        time.sleep(0.05)


def test_every_rank_gets_its_environment_and_the_first_waits_for_the_others(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "return", "return", "late"))
    assert (code, errors) == (0, "")
    assert {path.read_text().split(" ", 1)[1] for path in tmp_path.glob("[0-9]")} == {"127.0.0.1 29500 0 3"}
    assert sorted(path.name for path in tmp_path.glob("*.done")) == ["0.done", "1.done", "2.done"]


def test_a_rank_that_raises_is_named_and_ends_all(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "wait", "wait", "raise"))
    assert code == 1
    assert "lightning_par: rank 2 (pp 0, dp 0, tp 2) raised RuntimeError: raised on purpose: ending all ranks" in errors
    assert errors.count("Traceback") == 1, "it has the time to say where"
    wait_until_gone(ranks(tmp_path))


def test_a_rank_that_exits_is_named(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "wait", "exit", "wait"))
    assert code == 1
    assert "lightning_par: rank 1 (pp 0, dp 0, tp 1) ended with exit code 3: ending all ranks" in errors


def test_a_rank_that_fails_after_the_first_is_done_fails_the_run(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "return", "return", "raise later"))
    assert code == 1
    assert "rank 2 (pp 0, dp 0, tp 2) raised RuntimeError" in errors


def test_the_rank_that_failed_first_is_named_when_the_others_fail_with_it(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "raise later", "raise later", "raise"))
    assert code == 1
    assert "rank 2 (pp 0, dp 0, tp 2) raised RuntimeError" in errors
    assert errors.count("lightning_par:") == 1


def test_a_rank_that_is_killed_ends_those_that_ignore_a_polite_signal(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "stubborn", "die", "stubborn"))
    assert code == 1
    assert "rank 1 (pp 0, dp 0, tp 1) was killed by SIGKILL: ending all ranks" in errors
    wait_until_gone(ranks(tmp_path))


def test_a_rank_that_was_killed_is_named_though_what_others_raise_for_it_is_known_first(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "raise", "die later", "raise"))
    assert code == 1
    assert "lightning_par: rank 1 (pp 0, dp 0, tp 1) was killed by SIGKILL: ending all ranks" in errors
    assert errors.count("lightning_par:") == 1


def test_a_rank_that_does_not_answer_is_aborted_once_though_the_first_raises_with_it(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "raise with it", "stop", "stubborn"))
    assert code == 1
    assert "lightning_par: rank 1 (pp 0, dp 0, tp 1) has not answered for 1 s: ending all ranks" in errors
    assert re.search(r"line \d+ in act", errors.split("Fatal Python error: Aborted")[1]), "its stacks are whole"
    assert errors.count("Traceback") == 1
    assert errors.splitlines()[-1] == "RuntimeError: raised on purpose"
    wait_until_gone(ranks(tmp_path))


def test_when_the_first_rank_raises_its_error_is_the_message(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "raise", "wait", "stubborn"))
    assert code == 1
    assert errors.splitlines()[-1] == "RuntimeError: raised on purpose"
    assert "lightning_par:" not in errors
    wait_until_gone(ranks(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_first_rank_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, "wait", "wait", "stubborn")
    pids = ranks(tmp_path)
    process.send_signal(number)
    code, _ = finish(process)
    assert code != 0
    wait_until_gone(pids)


def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    process = start(tmp_path, "wait", "stubborn", "wait")
    pids = ranks(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to every process of the session's foreground group
    code, _ = finish(process)
    assert code != 0
    wait_until_gone(pids)


def test_what_cannot_work_is_found_before_any_process(tmp_path: Path) -> None:
    code, errors = finish(start(tmp_path, "refuse", "return", "return"))
    assert code == 1
    assert errors.splitlines()[-1].endswith("LayoutError: refused before any process")
    assert not list(tmp_path.iterdir())


def test_each_job_of_a_sweep_has_its_own_ranks(tmp_path: Path) -> None:
    text = "text='a, b={1}'"
    command = [
        sys.executable,
        str(ROOT / "tests" / "launched_hydra.py"),
        "--multirun",
        "ranks=3,4,2",
        text,
        "hydra.sweep.dir=sweep",
    ]
    result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1, "job 1 fails"
    assert "a job that fails" in result.stderr
    written = {str(path.relative_to(tmp_path / "sweep")): path.read_text() for path in (tmp_path / "sweep").glob("*/rank-*")}
    for job, size in ((0, 3), (2, 2)):
        for rank in range(size):
            assert written[f"{job}/rank-{rank}"] == f"{size} | a, b={{1}} | {job} | launched_hydra"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"], "no rank made a folder of its own"
    assert sorted(path.parent.name for path in tmp_path.glob("sweep/*/.hydra")) == ["0", "1", "2"]


def test_sigterm_ends_the_first_rank_without_a_broadcast() -> None:
    from lightning_par.host.launch.launcher import launcher_class

    launcher = object.__new__(launcher_class("pytorch_lightning"))
    launcher.procs = [object()]
    with pytest.raises(SystemExit) as end:
        launcher.kill(signal.SIGTERM)
    assert end.value.code == 128 + signal.SIGTERM
    launcher.procs = []  # ranks that others started: Lightning's own handling stays
    launcher.kill(signal.SIGTERM)
