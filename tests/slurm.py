"""The programs of SLURM that a job meets, on one machine: each node of a job is a name here.

    sbatch [OPTIONS] FILE [ARGS]    runs the file as SLURM would on the first node, with what its #SBATCH lines ask for
    srun [OPTIONS] COMMAND          starts the command once for each task of the job; its exit code is the first that is not 0
    sacct, scontrol                 say that all is well

Written into a folder for PATH by `install`, each as this file with a name. Without the project, as no node has it yet.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAMS = ("sbatch", "srun", "sacct", "scontrol", "squeue")
JOB = "4242"


def install(folder: Path) -> Path:
    """Write the programs into a folder."""
    folder.mkdir()
    for name in PROGRAMS:
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {name} "$@"\n')
        program.chmod(0o755)
    return folder


def job_environment(script: str) -> dict[str, str]:
    """What SLURM sets for a script with these #SBATCH lines, on its first node."""
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines() if line.startswith("#SBATCH --")
    )
    nodes, per_node = int(asked.get("nodes", 1)), int(asked.get("ntasks-per-node", 1))
    names = ",".join(["localhost", *(f"node{node}" for node in range(1, nodes))])
    return {
        "SLURM_JOB_ID": JOB,
        "SLURM_JOBID": JOB,
        "SLURM_JOB_NAME": asked.get("job-name", "sbatch"),
        "SLURM_NODELIST": names,
        "SLURM_JOB_NODELIST": names,
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_CPUS_PER_TASK": asked.get("cpus-per-task", "1"),
        **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0"),
    }


def task_environment(task: int) -> dict[str, str]:
    """What srun adds for a task, block by block; and what tells the nodes apart, which are one machine."""
    node, local = divmod(task, int(os.environ["SLURM_NTASKS_PER_NODE"]))
    return {
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
        "SLURM_STEP_ID": "0",
        "NCCL_HOSTID": f"node{node}",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _sbatch(words: list[str]) -> int:
    file = next(word for word in words if not word.startswith("-"))
    script = Path(file).read_text()
    environment = {**os.environ, **job_environment(script)}
    arguments = words[words.index(file) + 1 :]
    with open(f"slurm-{JOB}.out", "w") as output:
        process = subprocess.Popen(["bash", file, *arguments], env=environment, stdout=output, stderr=subprocess.STDOUT)
    print(f"Submitted batch job {JOB}")
    return process.wait() if "--wait" in words else 0


def _srun(words: list[str]) -> int:
    while words[0].startswith("-"):  # options that have their value in a word of its own
        words = words[2:] if words[0] in ("--output", "--error") else words[1:]
    tasks = [
        subprocess.Popen(words, env={**os.environ, **task_environment(task)}) for task in range(int(os.environ["SLURM_NTASKS"]))
    ]
    return next((code for code in [task.wait() for task in tasks] if code), 0)


def main() -> int:
    """Be the program that is named first."""
    name, *words = sys.argv[1:]
    if name == "sacct":
        print(f"JobID|State|NodeList\n{JOB}|RUNNING|localhost")
    return {"sbatch": _sbatch, "srun": _srun}.get(name, lambda words: 0)(words)


if __name__ == "__main__":
    sys.exit(main())
