"""Starts the other ranks of this machine for a `Trainer`, as Lightning's own launcher does, with three differences.

- What cannot work is found before any process is started (``preflight``).
- Under Hydra the ranks are started from the composed job, so that ``--multirun`` gives every job its own set of ranks.
- A rank that dies is named, and takes the others with it. With ``max_restarts`` they are started again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar, NoReturn

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_par.errors import ConfigurationError
from lightning_par.host.launch.command import is_sweep, output_folder, rank_command
from lightning_par.host.launch.ending import Stopped, exit_now
from lightning_par.host.launch.link import Unlinked, join_parent, report_failure
from lightning_par.host.launch.processes import RankProcesses
from lightning_par.host.launch.restart import this_run
from lightning_par.host.launch.supervisor import RunSupervisor
from lightning_par.private import lightning
from lightning_par.runtime.watchdog import Supervisor

# What starting ranks sets in this process, and ending a Hydra job must undo.
_ENVIRONMENT = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")


@lru_cache
def launcher_class(root: str) -> type[Any]:
    """The launcher for one of Lightning's two names.

    Args:
        root: "lightning.pytorch" or "pytorch_lightning"; the Trainer must come from the same.
    """
    return type("HybridParallelLauncher", (_RankLauncher, lightning.script_launcher_class(root)), {"root": root})


_Base: Any = object  # Lightning's launcher, by `launcher_class`


class _RankLauncher(_Base):
    """The part of the launcher that is ours; see `launcher_class`."""

    root: ClassVar[str]
    cluster_environment: Any
    describe: Callable[[int], str]
    num_processes: int
    num_nodes: int
    # The ranks of this process's current job. They outlive the Trainer that started them: the next Trainer of the same
    # script meets the same ranks, which run the same script.
    _current: ClassVar[_Job | None] = None

    def __init__(
        self,
        cluster_environment: Any,
        num_processes: int,
        num_nodes: int,
        *,
        describe: Callable[[int], str],
        preflight: Callable[..., None] | None = None,
        meet: Callable[[Any], None] | None = None,
        max_restarts: int = 0,
    ) -> None:
        """Args:
        cluster_environment: Lightning's `ClusterEnvironment`.
        num_processes: ranks on this machine.
        num_nodes: machines.
        describe: a rank's name for messages.
        preflight: called as ``preflight(trainer, *args, **kwargs)`` with what `launch` hands to its function, in every process,
            before any other process is started and before the ranks meet. What it raises ends the run.
        meet: called with the Trainer once all ranks are started, before Lightning looks for a checkpoint.
        max_restarts: how often the ranks of this machine are started again when one has failed.
        """
        super().__init__(cluster_environment, num_processes, num_nodes)
        self.describe = describe
        self._preflight, self._meet = preflight, meet
        self._max_restarts = max_restarts
        _end_earlier_job()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other ranks of this machine, unless torchrun, SLURM or an earlier call did, and run the function.

        With ``max_restarts`` all ranks are started, this process only supervises them and ends with the run: they run the whole
        script.

        Args:
            function: what the Trainer runs on every rank.
            *args: its arguments.
            trainer: the Trainer, for ``preflight``.
            **kwargs: its keyword arguments.

        Raises:
            Whatever ``preflight`` or the function raises; the other ranks are then ended.
        """
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        join_parent()
        with _ranks_end_on_error():
            run = this_run()
            if run is not None and trainer is not None and trainer.state.fn == "fit":
                args, kwargs = run.begin_fit(function, args, kwargs, trainer.is_global_zero)
            if self._preflight is not None:
                self._preflight(trainer, *args, **kwargs)
            if not self.cluster_environment.creates_processes_externally:
                if self._max_restarts:
                    self._supervise()
                self._call_children_scripts()
            elif self._max_restarts and join_parent() is None and _RankLauncher._current is None:
                rank_zero_warn(
                    f"max_restarts={self._max_restarts} is ignored: ranks are started again by who has started them: give "
                    f"--max-restarts={self._max_restarts} to torchrun"
                )
            lightning.share_threads(self.root, self.num_processes)
            if self._meet is not None:
                self._meet(trainer)
            return function(*args, **kwargs)

    @property
    def supervisor(self) -> Supervisor:
        """Who ends the run where this rank hangs. After `launch` has begun."""
        return join_parent() or (_RankLauncher._current.ranks if _RankLauncher._current is not None else Unlinked())

    def kill(self, signum: signal.Signals) -> None:
        """End the ranks that were started here; called by Lightning's handlers of signals.

        On SIGTERM this process ends at once: the handler would go on to a broadcast that meets whatever collective it
        interrupted. While the Trainer fits the handler is another, see `lightning_par.host.stop`.
        """
        if signum == signal.SIGTERM and (self.procs or join_parent() is not None):
            raise SystemExit(128 + signum)
        super().kill(signum)

    def _supervise(self) -> NoReturn:
        """Start all ranks, again and again, and end this process with the run.

        Raises:
            ConfigurationError: this process has more to do.
        """
        if is_sweep():
            raise ConfigurationError(
                f"max_restarts={self._max_restarts} does not go with --multirun, whose process runs the other jobs too: start "
                "each job by itself, or use max_restarts=0"
            )
        if _RankLauncher._current is not None:
            raise ConfigurationError(
                f"max_restarts={self._max_restarts}: an earlier Trainer of this script has started ranks already: give its "
                "strategy the same max_restarts"
            )
        locals_ = range(self.num_processes)
        environments = [{**self._environment(), "LOCAL_RANK": str(local)} for local in locals_]
        commands = [rank_command()] * self.num_processes
        first = self.cluster_environment.node_rank() * self.num_processes
        supervisor = RunSupervisor(commands, environments, lambda index: self.describe(first + index), self._max_restarts)
        exit_now(supervisor.run())  # no exception: callbacks and loggers would hear of the end of a training that was not here

    def _call_children_scripts(self) -> None:
        """Start the ranks. The base class's method of this name does it in the stock way, and is not to run."""
        saved = {name: os.environ.get(name) for name in _ENVIRONMENT}
        os.environ.update(self._environment(), LOCAL_RANK=str(self.cluster_environment.local_rank()))
        first = self.cluster_environment.node_rank() * self.num_processes
        ranks = RankProcesses(lambda index: self.describe(first + 1 + index))
        _RankLauncher._current = _Job(output_folder(), ranks, saved)
        locals_ = range(1, self.num_processes)
        ranks.start([rank_command()] * len(locals_), [{"LOCAL_RANK": str(local)} for local in locals_])
        self.procs = ranks.processes  # the base class forwards signals to these

    def _environment(self) -> dict[str, str]:
        """What the ranks of this machine have in common."""
        environment = self.cluster_environment
        return {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": str(environment.main_port),
            "NODE_RANK": str(environment.node_rank()),
            "WORLD_SIZE": str(self.num_processes * self.num_nodes),
        }


class _Job:
    """The ranks started for one Hydra job, or for the script where there is no Hydra."""

    def __init__(self, name: str | None, ranks: RankProcesses, environment: dict[str, str | None]) -> None:
        self.name = name
        self.ranks = ranks
        self._environment = environment

    def end(self) -> None:
        """Wait for the ranks and undo what starting them did to this process, so that the next job can start its own."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
        self.ranks.finish()
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _end_earlier_job() -> None:
    """Under ``--multirun`` one process runs job after job: the ranks of an earlier one are over."""
    job = _RankLauncher._current
    if job is not None and job.name != output_folder():
        _RankLauncher._current = None
        job.end()


@contextmanager
def _ranks_end_on_error() -> Iterator[None]:
    try:
        yield
    except Stopped:  # all ranks: the others need no help
        raise
    except BaseException as error:
        report_failure(error)
        if _RankLauncher._current is not None:
            _RankLauncher._current.ranks.abort()
        raise
