"""Runs that are asked to stop: they save, end with exit code 0, and go on from there as if nothing had been."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_par.host import stop
from lightning_par.host.launch.ending import Stopped
from lightning_par.host.stop import StopCallback
from tests.test_launcher import ENVIRONMENT, ROOT, is_alive

SURVIVOR = str(ROOT / "benchmarks" / "survivor.py")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--max-restarts", "1")

pytestmark = pytest.mark.alone


# ------------------------------------------------------------------ one rank


class FakeTrainer(SimpleNamespace):
    """What the callback asks of a Trainer."""

    def __init__(self, folder: Path, environment: Any = None) -> None:
        super().__init__(
            global_step=0,
            world_size=1,
            is_global_zero=True,
            checkpoint_callback=SimpleNamespace(dirpath=str(folder)),
            default_root_dir="elsewhere",
            strategy=SimpleNamespace(
                cluster_environment=environment, checkpoints=SimpleNamespace(wait=lambda: self.done.append("wait"))
            ),
            done=[],
        )

    def save_checkpoint(self, path: Path) -> None:
        self.done.append(str(path))


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    saved = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in saved.items():
        signal.signal(number, handler)


def begin(trainer: FakeTrainer) -> StopCallback:
    callback = StopCallback()
    callback.on_train_start(trainer, None)
    return callback


def test_a_step_is_finished_and_saved_before_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = FakeTrainer(tmp_path)
    callback = begin(trainer)
    callback.on_train_batch_end(trainer, None)
    os.kill(os.getpid(), signal.SIGTERM)
    callback.on_train_batch_end(trainer, None, "outputs", "batch", 0)
    assert not trainer.done, "gradients pile up: the optimizers have not stepped"
    trainer.global_step = 1
    with pytest.raises(Stopped) as end:
        callback.on_train_batch_end(trainer, None)
    assert end.value.code is None, "exit code 0"
    path = tmp_path / "preempted.ckpt"
    assert trainer.done == [str(path), "wait"], "it is on the disk before anybody hears of it"
    assert capfd.readouterr().err == (
        f"lightning_par: told to stop after step 1: saved {path}; to go on from there: ckpt_path={path}\n"
    )


def test_without_a_model_checkpoint_it_is_saved_in_the_default_folder(tmp_path: Path) -> None:
    trainer = FakeTrainer(tmp_path)
    trainer.checkpoint_callback = None
    callback = begin(trainer)
    os.kill(os.getpid(), signal.SIGTERM)
    trainer.global_step = 1
    with pytest.raises(Stopped):
        callback.on_train_batch_end(trainer, None)
    assert trainer.done[0] == "elsewhere/preempted.ckpt"


def test_what_was_noted_after_the_last_step_counts(tmp_path: Path) -> None:
    trainer = FakeTrainer(tmp_path)
    callback = begin(trainer)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        callback.on_train_end(trainer, None)
    assert trainer.done[0] == str(tmp_path / "preempted.ckpt")


def test_in_another_thread_no_handler_is_set(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=begin, args=(FakeTrainer(tmp_path),))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_the_rank_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(FakeTrainer(tmp_path))
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # another copy of the same
    monkeypatch.setattr(stop, "SAME_SIGNAL_SECONDS", 0.0)
    with pytest.raises(SystemExit) as end:
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 128 + signal.SIGTERM


def test_a_fit_after_one_that_was_told_to_stop_is_told_nothing(tmp_path: Path) -> None:
    trainer = FakeTrainer(tmp_path)
    callback = begin(trainer)
    os.kill(os.getpid(), signal.SIGTERM)
    callback.on_train_start(trainer, None)
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, None)


def slurm(**options: Any) -> Any:
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    return SLURMEnvironment(**options)


def test_under_slurm_lightnings_handler_runs_at_the_end_of_the_step(tmp_path: Path) -> None:
    trainer = FakeTrainer(tmp_path, slurm(requeue_signal=signal.SIGUSR2))
    signal.signal(signal.SIGUSR2, lambda number, frame: trainer.done.append(f"requeued on {number.real}"))
    callback = begin(trainer)
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)  # SLURM may send both
    assert not trainer.done
    trainer.global_step = 1
    with pytest.raises(Stopped):
        callback.on_train_batch_end(trainer, None)
    assert trainer.done == [f"requeued on {signal.SIGUSR2.value}"]


def test_under_slurm_without_requeueing_its_signal_is_as_sigterm(tmp_path: Path) -> None:
    trainer = FakeTrainer(tmp_path, slurm(auto_requeue=False))
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    callback = begin(trainer)
    os.kill(os.getpid(), signal.SIGUSR1)
    trainer.global_step = 1
    with pytest.raises(Stopped):
        callback.on_train_batch_end(trainer, None)
    assert trainer.done[0] == str(tmp_path / "preempted.ckpt")


# ------------------------------------------------------------------ whole runs


def train(folder: Path, layout: str, *words: str, launch: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *launch, SURVIVOR, str(folder), layout, *words]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(folder: Path, pattern: str, within: float = 120) -> None:
    deadline = time.monotonic() + within
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.01)


def learned(folder: Path) -> dict[tuple[str, str], Any]:
    from benchmarks.fault import tensors_of

    return tensors_of(folder / "end.ckpt")


def assert_equal(one: dict[Any, Any], other: dict[Any, Any]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not one[name].equal(other[name])] == []


@pytest.mark.parametrize("max_restarts", ["0", "1"])
def test_a_run_that_is_told_to_stop_saves_and_ends_well(max_restarts: str, tmp_path: Path) -> None:
    from lightning_par.checkpoint import Checkpoint

    process = train(tmp_path, "pp2_mb2", max_restarts)
    wait_for(tmp_path, "step=*.ckpt")
    told_at = time.monotonic()
    process.send_signal(signal.SIGTERM)  # to the first rank alone, or to the supervisor
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert time.monotonic() - told_at < 30
    assert errors.count("lightning_par:") == 1
    assert f"saved {tmp_path / 'preempted.ckpt'}; to go on from there: ckpt_path={tmp_path / 'preempted.ckpt'}" in errors
    assert not [pid for pid in map(int, (path.read_text() for path in (tmp_path / "ranks").glob("?-[0-9]"))) if is_alive(pid)]
    assert Checkpoint(tmp_path / "preempted.ckpt").trainer()["trainer"]["global_step"] < 60


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["first", "other", "all"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(whom: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "tp2_pp2_mb2", "0")
    assert whole.communicate(timeout=300)[0] is None
    process = train(tmp_path / "stopped", "tp2_pp2_mb2", "0")
    wait_for(tmp_path / "stopped", "step=2?.ckpt")
    if whom == "all":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        rank = int((tmp_path / "stopped" / "ranks" / "0-3").read_text())
        os.kill(process.pid if whom == "first" else rank, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    preempted = tmp_path / "stopped" / "preempted.ckpt"
    assert preempted.is_dir(), errors
    resumed = train(tmp_path / "resumed", "tp2_pp2_mb2", "0", str(preempted))
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert_equal(learned(tmp_path / "whole"), learned(tmp_path / "resumed"))


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again_and_it_goes_on(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "pp2_mb2", "0")
    whole.communicate(timeout=300)
    process = train(tmp_path / "killed", "pp2_mb2", "0", launch=TORCHRUN)
    wait_for(tmp_path / "killed", "step=2?.ckpt")
    os.kill(int((tmp_path / "killed" / "ranks" / "0-1").read_text()), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"lightning_par: restart 1 of 1: going on from {tmp_path / 'killed'}/" in errors
    assert_equal(learned(tmp_path / "whole"), learned(tmp_path / "killed"))


def submit(folder: Path, port: int) -> list[subprocess.Popen[str]]:
    """Two tasks, as ``srun`` starts them. ``scontrol`` writes down what it is told."""
    control = folder.parent / "bin" / "scontrol"
    control.parent.mkdir(exist_ok=True)
    control.write_text(f'#!/bin/sh\necho "$@" >> {folder.parent / "told"}\n')
    control.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    job["SLURM_STEP_ID"] = "0"
    job["PATH"] = os.pathsep.join([str(control.parent), os.environ["PATH"]])
    return [
        subprocess.Popen(
            [sys.executable, SURVIVOR, str(folder), "pp2_mb2", "0"],
            env={**ENVIRONMENT, **job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
def test_a_job_of_slurm_that_is_pre_empted_is_requeued_and_goes_on(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "pp2_mb2", "0")
    whole.communicate(timeout=300)
    folder = tmp_path / "job"
    port = 20000 + os.getpid() % 10000
    tasks = submit(folder, port)
    wait_for(folder, "step=2?.ckpt")
    for task in tasks:  # SLURM signals every task
        task.send_signal(signal.SIGUSR1)
    errors = [task.communicate(timeout=60)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors
    assert (tmp_path / "told").read_text() == "requeue 7\n"
    assert (folder / "hpc_ckpt_1.ckpt").is_dir()
    errors = [task.communicate(timeout=300)[1] for task in submit(folder, port + 1)]
    assert (folder / "ranks" / "0-1").exists()
    assert_equal(learned(tmp_path / "whole"), learned(folder))
