"""A stage that raises, hangs, is stopped or killed: all ranks end soon, and what is seen says where it was."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_launcher import ENVIRONMENT, ROOT, is_alive

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "3", "--standalone")
HANG_SECONDS = 3
HUNG_LINE = "time.sleep(600)  # the hung line"

pytestmark = pytest.mark.alone


def fail(folder: Path, case: str, phase: str, stage: int, hang_seconds: float = HANG_SECONDS, launch: tuple[str, ...] = ()) -> str:
    """Let a stage fail; all ranks must be gone in time. Returns what they wrote to standard error."""
    script = [str(ROOT / "tests" / "launched_pipeline.py"), str(folder), case, phase, str(stage), str(hang_seconds)]
    result = subprocess.run([sys.executable, *launch, *script], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    failed_at = float((folder / "failed").read_text())
    pids = [int(path.read_text()) for path in folder.glob("[0-9]")]
    assert len(pids) == 3
    while any(map(is_alive, pids)) and time.time() - failed_at < 30:
        time.sleep(0.05)
    assert not list(filter(is_alive, pids))
    assert time.time() - failed_at < 30, "half a minute is promised"
    assert result.returncode != 0
    return result.stderr


def name_of(stage: int) -> str:
    return f"rank {stage} (pp {stage}, dp 0, tp 0)"


def test_a_stage_that_hangs_is_named_with_the_line_it_hangs_in(tmp_path: Path) -> None:
    errors = fail(tmp_path, "sleep", "forward", 1)
    assert f"{name_of(1)} stands still in" in errors
    assert HUNG_LINE in errors
    assert errors.count("stands still in") == 2, "its own words and the first rank's; nobody who waits is blamed"
    assert errors.index("ending all ranks") > errors.index(HUNG_LINE)


def test_a_stage_that_is_stopped_shows_its_stacks_and_ends(tmp_path: Path) -> None:
    errors = fail(tmp_path, "stop", "backward", 2)
    assert f"lightning_par: {name_of(2)} has not answered for 3 s: ending all ranks" in errors
    assert "in fail" in errors.split("Fatal Python error: Aborted")[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(3))
def test_a_stage_that_raises_ends_all_with_its_traceback(stage: int, tmp_path: Path) -> None:
    errors = fail(tmp_path, "raise", "forward", stage)
    assert "RuntimeError: raised on purpose" in errors
    assert 'raise RuntimeError("raised on purpose")' in errors
    assert (f"lightning_par: {name_of(stage)} raised RuntimeError" in errors) == (stage > 0), "the first says it itself"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "phase", "stage", "shown"),
    [
        ("kill", "forward", 1, "was killed by SIGKILL: ending all ranks"),
        ("kill", "backward", 2, "was killed by SIGKILL: ending all ranks"),
        ("kill", "step", 1, "was killed by SIGKILL: ending all ranks"),
        ("kill", "backward", 0, ""),  # nobody is left to say it
        ("sleep", "backward", 0, f"lightning_par: {name_of(0)} stands still in"),
        ("hold", "forward", 2, "has not answered for 3 s: ending all ranks"),
        ("stop", "forward", 0, "the first rank of this machine has not answered for"),
    ],
)
def test_a_stage_that_fails_otherwise_ends_all(case: str, phase: str, stage: int, shown: str, tmp_path: Path) -> None:
    assert shown in fail(tmp_path, case, phase, stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "phase", "stage", "shown"),
    [
        ("raise", "forward", 0, "RuntimeError: raised on purpose"),
        ("kill", "step", 1, "(SIGKILL)"),
        ("sleep", "forward", 1, HUNG_LINE),
        ("hold", "backward", 1, "in fail"),
    ],
)
def test_under_torchrun_all_end_too(case: str, phase: str, stage: int, shown: str, tmp_path: Path) -> None:
    assert shown in fail(tmp_path, case, phase, stage, launch=TORCHRUN)


@pytest.mark.slow
def test_by_default_a_hang_ends_the_run_within_half_a_minute(tmp_path: Path) -> None:
    errors = fail(tmp_path, "sleep", "forward", 2, hang_seconds=20)
    assert f"{name_of(2)} stands still in" in errors
