"""The same command under torchrun, in the pods of Kubernetes, under SLURM, and on two hosts with a slow link between them."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import hosts, slurm
from tests.test_launcher import ENVIRONMENT, ROOT
from tests.test_train import TINY

GUIDE = (ROOT / "docs" / "clusters.md").read_text()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TIMES_FASTER = 2.0  # the default order of axes, over a link of 20 Mbit/s; 6 where nobody else is on the machine


def block(pattern: str) -> str:
    """The fenced block of the guide that has these words."""
    (found,) = [text for text in re.findall(r"```[^\n]*\n(.*?)```", GUIDE, re.DOTALL) if re.search(pattern, text)]
    return found


def environment(**more: str) -> dict[str, str]:
    return {**ENVIRONMENT, "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def check_tree(output: Path, files: set[str], coordinates: list[str]) -> None:
    """Only the first rank has written; each rank has a log, and every line of what loggers say has its name."""
    assert {path.name for path in output.iterdir()} == files
    logs = sorted((output / "ranks").iterdir())
    assert [path.name for path in logs] == [
        f"rank_{rank:02d}_{at.replace(' ', '').replace(',', '_')}.log" for rank, at in enumerate(coordinates)
    ]
    for rank, (path, at) in enumerate(zip(logs, coordinates, strict=True)):
        labels = {match[0] for match in re.finditer(r"^\[rank .*?\](?= \[\d{4}-)", path.read_text(), re.MULTILINE)}
        assert labels and labels <= {f"[rank {rank}]", f"[rank {rank} ({at})]"}
    job = (output / "train.log").read_text().splitlines()
    unnamed = [line for line in job if not line.startswith(("[rank 0]", f"[rank 0 ({coordinates[0]})]"))]
    assert job and [line for line in unnamed if "[submitit]" not in line] == []  # which speaks when the job is over


# ------------------------------------------------------------------ torchrun, and Kubernetes


@pytest.mark.slow
def test_in_a_pod_the_environment_is_enough_for_torchrun(tmp_path: Path) -> None:
    pod = {"PET_NNODES": "1", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "2", "WORLD_SIZE": "1", "RANK": "0"}
    for prefix in ("", "PET_"):
        pod |= {f"{prefix}MASTER_ADDR": "127.0.0.1", f"{prefix}MASTER_PORT": str(free_port())}
    command = [*TORCHRUN, str(ROOT / "train.py"), "parallel=tp2", "hydra.run.dir=out", *TINY]
    result = subprocess.run(command, cwd=tmp_path, env=environment(**pod), capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert f"lightning_par: the log of each rank is in {tmp_path / 'out' / 'ranks'}\n" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_tree(tmp_path / "out", {".hydra", "checkpoints", "log", "ranks", "train.log"}, ["pp 0, dp 0, tp 0", "pp 0, dp 0, tp 1"])


def test_the_manifest_has_the_command_and_what_it_needs() -> None:
    import yaml

    job = yaml.safe_load(block("PyTorchJob"))
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"] == replicas["Worker"]
    container = replicas["Master"]["template"]["spec"]["containers"][0]
    assert container["command"][:2] == ["torchrun", "train.py"]
    assert job["spec"]["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert container["name"] == "pytorch", "the operator looks for it"


# ------------------------------------------------------------------ SLURM


@pytest.mark.slow
def test_the_job_of_the_guide_trains(tmp_path: Path) -> None:
    """On two nodes of one task each, in a layout for so many."""
    script = block("#SBATCH").replace("ntasks-per-node=8", "ntasks-per-node=1").replace("tp8_pp2", "pp2")
    script = script.replace("python train.py", f"{sys.executable} {ROOT / 'train.py'}")
    (tmp_path / "train.sbatch").write_text(script)
    programs = slurm.install(tmp_path / "bin")
    (command,) = [shlex.split(line) for line in GUIDE.splitlines() if line.startswith("sbatch ")]
    command = [command[0], "--wait", command[1], *TINY]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment(PATH=f"{programs}:{os.environ['PATH']}", MASTER_PORT=str(free_port())), timeout=200
    )
    said = (tmp_path / f"slurm-{slurm.JOB}.out").read_text()
    assert result.returncode == 0, said
    assert "lightning_par: 2 hosts x 1 ranks: pp between hosts\n" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "outputs", f"slurm-{slurm.JOB}.out", "train.sbatch"]
    check_tree(
        tmp_path / "outputs" / slurm.JOB,
        {".hydra", "checkpoints", "log", "ranks", "train.log"},
        ["pp 0, dp 0, tp 0", "pp 1, dp 0, tp 0"],
    )


@pytest.mark.slow
def test_hydra_submits_the_job_and_waits_for_it(tmp_path: Path) -> None:
    """The command of the guide, for one node of two tasks."""
    pytest.importorskip("submitit")
    programs = slurm.install(tmp_path / "bin")
    words = shlex.split(block("additional_parameters").replace("\\\n", " "))
    smaller = {"parallel": "tp2", "hydra.launcher.nodes": "1", "hydra.launcher.tasks_per_node": "2"}
    overrides = [f"{key}={smaller.get(key, value)}" for key, _, value in (word.partition("=") for word in words[3:])]
    command = [sys.executable, str(ROOT / "train.py"), "-m", *overrides, "hydra.sweep.dir=sweep", *TINY]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(PATH=f"{programs}:{os.environ['PATH']}", MASTER_PORT=str(free_port())),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    (submitted,) = (tmp_path / "sweep" / ".submitit").rglob("*submission.sh")
    asked = {line for line in submitted.read_text().splitlines() if line.startswith("#SBATCH")}
    assert asked >= {
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=1440",
        "#SBATCH --signal=USR1@120",
    }
    check_tree(
        tmp_path / "sweep" / "0", {".hydra", "checkpoints", "log", "ranks", "train.log"}, ["pp 0, dp 0, tp 0", "pp 0, dp 0, tp 1"]
    )


# ------------------------------------------------------------------ two hosts


@pytest.mark.slow
def test_on_two_hosts_the_default_order_of_axes_beats_the_reverse(tmp_path: Path) -> None:
    reason = hosts.lacking()
    if reason is not None:
        pytest.skip(reason)
    command = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=one:29400", "--rdzv-id=7"]
    command += [str(ROOT / "tests" / "launched_hosts.py"), str(tmp_path / "found.json")]
    with hosts.two_hosts(tmp_path, megabits_per_second=20) as both:
        agents = [host.start(command, environment(), tmp_path) for host in both]
        try:
            said = [agent.communicate(timeout=150)[0] for agent in agents]
        finally:
            for agent in agents:
                hosts.end(agent)
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)
    assert "lightning_par: 2 hosts x 2 ranks: tp inside a host, pp between hosts\n" in "".join(said)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["default"]["losses"] == found["reverse"]["losses"]
    default, reverse = (min(found[order]["seconds"]) for order in ("default", "reverse"))
    assert reverse > TIMES_FASTER * default, f"{default:.3f} s by default, {reverse:.3f} s in reverse"
