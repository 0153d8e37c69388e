"""train.py as users start it: real ranks, real Lightning."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TINY = [
    "callbacks=default", "trainer.max_steps=4", "trainer.val_check_interval=2", "model.network.width=32", "model.network.depth=2",
    "data.batch_size=8", "data.context=32", "+data.num_validation_windows=16",
]  # fmt: skip


def train(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*words, *TINY], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)


def last_validation_loss(output: Path) -> float:
    with (output / "log" / "metrics.csv").open() as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]][-1]


@pytest.mark.slow
def test_a_sweep_over_layouts_trains_the_same_model_in_each(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--multirun",
        "parallel=single,tp2_pp2,pp2_zero1,tp3",
        "hydra.sweep.dir=sweep",
    ]
    result = train(*command, "trainer.devices=auto", folder=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "tp3: network.blocks.0.attention.query has 4 heads" in result.stderr
    assert "Traceback" not in result.stderr
    single, *others = [last_validation_loss(tmp_path / "sweep" / str(job)) for job in range(3)]
    assert others[0] == pytest.approx(single, rel=1e-5)
    assert [len(list((tmp_path / "sweep" / str(job)).glob("*.log"))) for job in range(3)] == [1, 1, 1], "the first rank's"
    assert [len(list((tmp_path / "sweep" / str(job)).glob("ranks/*.log"))) for job in range(3)] == [0, 4, 4]
