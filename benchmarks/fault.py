"""One run whose ranks are killed: who, when, and what came of it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.survivor import NUM_STEPS
from lightning_par.checkpoint import Checkpoint
from lightning_par.errors import CheckpointError

SCRIPT = Path(__file__).with_name("survivor.py")
LAYOUT, NUM_RANKS, MAX_RESTARTS = "tp2_pp2_mb2", 4, 3
HANG_SECONDS = 30.0  # longer than this from the kill to the end of all ranks is a hang
ENDED = "ended"
_RUN_SECONDS = 600.0  # a run that takes longer is given up
_POLL_SECONDS = 0.005
_STARTING_SECONDS, _STEP_SECONDS = 5.0, 0.1  # about what a start, and a step with its save, take
State = dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class Kill:
    """Which rank is killed, and when.

    Attributes:
        rank: which.
        step: once it has begun so many steps; 0 for while it starts.
        seconds: after that.
    """

    rank: int
    step: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        kill: what was done to it.
        doing: what the rank was doing when it was killed.
        end_seconds: from the kill until no rank was left; None where that took more than `HANG_SECONDS`.
        restart_seconds: from the kill until all ranks were training again; None where they never did.
        unreadable: checkpoints that could not be read, after the kill or after the run.
        has_resumed: whether it came to its end, and went on from a checkpoint where there was one.
        is_equal: whether it has learned what the run that was not killed has.
    """

    kill: Kill
    doing: str
    end_seconds: float | None
    restart_seconds: float | None
    unreadable: int
    has_resumed: bool
    is_equal: bool


def draw_kills(seed: int, count: int) -> list[Kill]:
    """Which ranks to kill, at moments spread evenly over the steps of a run, and over the time of a step and its save.

    Args:
        seed: of the draws.
        count: how many runs.
    """
    generator = random.Random(seed)
    draws = [(generator.randrange(NUM_RANKS), generator.randrange(NUM_STEPS - 1), generator.random()) for _ in range(count)]
    return [Kill(rank, step, part * (_STARTING_SECONDS if step == 0 else _STEP_SECONDS)) for rank, step, part in draws]


def run_whole(folder: Path) -> State:
    """What a run that nobody kills learns.

    Raises:
        RuntimeError: it failed.
    """
    with _started(folder) as process:
        if process.wait(_RUN_SECONDS):
            raise RuntimeError(f"a run that nobody killed has failed: see {folder / 'errors'}")
    return tensors_of(folder / "end.ckpt")


def run_killed(folder: Path, kill: Kill, whole: State) -> Outcome:
    """Let a run lose a rank.

    Args:
        folder: for it.
        kill: which rank, and when.
        whole: what it should learn.
    """
    with _started(folder) as process:
        pids = _pids(folder, 0, process)
        said = folder / "ranks" / f"0-{kill.rank}.doing"
        while int(said.read_text().rpartition(" ")[2]) < kill.step and process.poll() is None:
            time.sleep(_POLL_SECONDS)
        time.sleep(kill.seconds)
        doing = said.read_text().rpartition(" ")[0]
        try:
            os.kill(pids[kill.rank], signal.SIGKILL)
        except ProcessLookupError:
            doing = ENDED
        killed_at = time.monotonic()
        end_seconds = _wait_for_end(pids, killed_at)
        there = _checkpoints(folder)
        unreadable = sum(not _is_readable(path) for path in there)
        restart_seconds = _wait_for_training(folder, process, killed_at)
        try:
            code = process.wait(_RUN_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
    errors = (folder / "errors").read_text()
    was_restarted = "lightning_par: restart 1 of" in errors
    went_on = not was_restarted or not there or ": going on from " in errors
    is_equal = code == 0 and _is_equal(tensors_of(folder / "end.ckpt"), whole)
    unreadable += sum(not _is_readable(path) for path in _checkpoints(folder))
    return Outcome(kill, doing, end_seconds, restart_seconds, unreadable, code == 0 and went_on, is_equal)


def tensors_of(path: Path) -> State:
    """Every tensor of a checkpoint: weights and moments.

    Raises:
        CheckpointError: it cannot be read.
    """
    checkpoint = Checkpoint(path)
    entries = checkpoint.index.entries
    return {(name, what): checkpoint.read_whole(name, what) for name, entry in entries.items() for what in entry.values}


@contextmanager
def _started(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run, which is ended with all of its ranks where the block is left early."""
    folder.mkdir(parents=True)
    root = str(SCRIPT.parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), LAYOUT, str(MAX_RESTARTS)]
    with (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(command, env=environment, stdout=errors, stderr=errors)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _pids(folder: Path, start: int, process: subprocess.Popen[bytes]) -> list[int]:
    """Of the ranks, once all of a start are there."""
    files = [folder / "ranks" / f"{start}-{rank}" for rank in range(NUM_RANKS)]
    while not all(file.exists() for file in files):
        if process.poll() is not None:
            raise RuntimeError(f"a run has failed before it began: see {folder / 'errors'}")
        time.sleep(_POLL_SECONDS)
    return [int(file.read_text()) for file in files]


def _wait_for_end(pids: list[int], killed_at: float) -> float | None:
    while any(map(_is_alive, pids)):
        if time.monotonic() > killed_at + HANG_SECONDS:
            return None
        time.sleep(_POLL_SECONDS)
    return time.monotonic() - killed_at


def _wait_for_training(folder: Path, process: subprocess.Popen[bytes], killed_at: float) -> float | None:
    """Until every rank of the second start trains."""
    files = [folder / "ranks" / f"1-{rank}.doing" for rank in range(NUM_RANKS)]
    while process.poll() is None:
        if all(file.exists() and file.read_text().startswith(("stepping", "saving", "between")) for file in files):
            return time.monotonic() - killed_at
        time.sleep(_POLL_SECONDS)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"))


def _is_readable(path: Path) -> bool:
    try:
        tensors_of(path)
    except CheckpointError:
        return not path.exists()  # the run that goes on has pruned it meanwhile
    return True


def _is_equal(state: State, whole: State) -> bool:
    return state.keys() == whole.keys() and all(state[name].equal(whole[name]) for name in whole)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
