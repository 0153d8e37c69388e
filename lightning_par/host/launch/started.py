"""What this process knows of the ranks from who has started it, before any of them have met.

    started by                           rank                     ranks                   ranks of this machine
    torchrun                             RANK                     WORLD_SIZE              LOCAL_WORLD_SIZE
    srun                                 SLURM_PROCID             SLURM_NTASKS            SLURM_NTASKS_PER_NODE
    mpirun of Open MPI                   OMPI_COMM_WORLD_RANK     OMPI_COMM_WORLD_SIZE    OMPI_COMM_WORLD_LOCAL_SIZE
    the first rank of a machine          LOCAL_RANK, after those of NODE_RANK machines
    nobody: the first rank of a machine  NODE_RANK machines are before it

torchrun may itself be started by srun, so that its variables count first. In a shell inside an allocation of SLURM (a job of the
name bash or interactive, as Lightning tells it) SLURM's count for nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from lightning_par.errors import ConfigurationError


@dataclass(frozen=True)
class Starter:
    """A program that starts ranks on all machines: what it sets in their environment, and what it is told."""

    name: str
    rank: str
    world_size: str
    local_size: str
    per_node_option: str
    nodes_option: str


_STARTERS = (
    Starter("torchrun", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "--nproc-per-node", "--nnodes"),
    Starter("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "--ntasks-per-node", "--nodes"),
    Starter(
        "mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "--npernode", "the number of hosts"
    ),
)


def starter() -> Starter | None:
    """The program that has started this process as one of many ranks; None where none has."""
    is_interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    found = [one for one in _STARTERS if one.rank in os.environ and one.world_size in os.environ]
    return next((one for one in found if not (is_interactive and one.name == "srun")), None)


def started_rank() -> int:
    """This rank among all; of those that are started by the first rank of their machine, the number of that machine."""
    one = starter()
    return int(os.environ[one.rank] if one is not None else os.environ.get("NODE_RANK", 0))


def is_first_rank() -> bool:
    """Whether this process is the first rank, which alone writes the folder of a run."""
    return started_rank() == 0 and (starter() is not None or os.environ.get("LOCAL_RANK", "0") == "0")


def started_words() -> str:
    """A name for this rank until its coordinate is known; empty for one that may be alone."""
    one = starter()
    if one is not None:
        return f"rank {os.environ[one.rank]}" if int(os.environ[one.world_size]) > 1 else ""
    return "" if is_first_rank() else f"local rank {os.environ.get('LOCAL_RANK', 0)}"


def started_on_this_machine() -> int | None:
    """How many ranks a starter has put on this machine; None where there is none, or it does not say."""
    one = starter()
    return int(os.environ[one.local_size]) if one is not None and one.local_size in os.environ else None


def count_machines(num_devices: int, num_nodes: int) -> int:
    """How many machines the ranks are on that a starter has started.

    Args:
        num_devices: ranks of this machine, as the Trainer has them.
        num_nodes: machines, as the Trainer has them. 1 is Lightning's default, so that it stands for any number.

    Raises:
        ConfigurationError: others were started than the Trainer says; or srun should have started this process, and has not.
    """
    one = starter()
    if one is None:
        return num_nodes
    if one.name == "srun" and "SLURM_STEP_ID" not in os.environ and os.environ[one.world_size] != "1":
        raise ConfigurationError(
            f"SLURM_NTASKS={os.environ[one.world_size]}, and this process is none of these tasks, as there is no SLURM_STEP_ID: "
            "put srun before the command, such as srun python train.py"
        )
    world_size, here = int(os.environ[one.world_size]), started_on_this_machine()
    if here is not None and here != num_devices:
        raise ConfigurationError(
            f"devices={num_devices}, and {one.name} has started {here} ranks on this machine: use devices={here}, or "
            f"{one.name} {one.per_node_option}={num_devices}"
        )
    machines, rest = divmod(world_size, num_devices)
    if rest:
        raise ConfigurationError(
            f"{one.name} has started {world_size} ranks, {num_devices} of them on this machine: every machine must have as many: "
            f"give each the same {one.per_node_option}"
        )
    if num_nodes not in (1, machines):
        raise ConfigurationError(
            f"num_nodes={num_nodes} with devices={num_devices} is {num_nodes * num_devices} ranks, and {one.name} has started "
            f"{world_size}: leave num_nodes out, or use {one.name} {one.nodes_option}={num_nodes}"
        )
    return machines


def check_is_rank() -> None:
    """Refuse to start ranks in a pod of a PyTorchJob, where each pod would take itself for the first machine.

    Raises:
        ConfigurationError: this is a pod of several, and nobody has started ranks in it.
    """
    pods = int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" in os.environ and "LOCAL_RANK" not in os.environ and pods > 1:
        raise ConfigurationError(
            f"RANK={os.environ['RANK']} of WORLD_SIZE={pods} is set, as in a pod of a PyTorchJob, and no LOCAL_RANK: use torchrun "
            "in the place of python, which starts the ranks of this pod"
        )
