"""A Hydra program that trains with a layout: `hydra.main` plus what many ranks and clear errors need.

    @app(config_path="conf", config_name="train")
    def main(config): ...

    main()

Exit codes: 0 done, 2 the configuration cannot work (the message alone, no traceback), 1 anything else.
"""

from __future__ import annotations

import atexit
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from importlib.metadata import version
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from lightning_par.config.search_path import register
from lightning_par.errors import ConfigurationError
from lightning_par.host.launch.command import remember_main
from lightning_par.host.launch.ending import MISCONFIGURED
from lightning_par.host.launch.rank_log import RankLog
from lightning_par.host.launch.started import is_first_rank, started_rank, started_words

Task = Callable[[DictConfig], Any]


def app(config_path: str, config_name: str, has_folder: bool = True) -> Callable[[Task], Callable[[], None]]:
    """Decorate the task of a Hydra program, as `hydra.main` does.

    Args:
        config_path: folder of the configs, relative to the task's file, or ``pkg://package.folder``.
        config_name: the primary config.
        has_folder: whether the program has a folder of its own for each run, in which its ranks log.
    """

    def decorate(task: Task) -> Callable[[], None]:
        @wraps(task)
        def main() -> None:
            register()
            remember_main()
            _quiet_other_ranks()
            try:
                hydra.main(config_path=config_path, config_name=config_name, **_version_base())(
                    _with_clear_errors(task, has_folder)
                )()
            except SystemExit as end:
                # Hydra has printed the error that it is handling. A compact one is about the config, not a crash.
                if end.code == 1 and isinstance(end.__context__, CompactHydraException):
                    raise SystemExit(MISCONFIGURED) from None
                raise

        return main

    return decorate


def _with_clear_errors(task: Task, has_folder: bool) -> Task:
    @wraps(task)
    def guarded(config: DictConfig) -> Any:
        logs = has_folder and logging.getLogger().hasHandlers()
        rank_log: AbstractContextManager[Any] = RankLog(is_first_rank(), started_words()) if logs else nullcontext()
        try:
            with rank_log:
                return task(config)
        except ConfigurationError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:  # the other jobs go on; Hydra prints the error at the end
                raise CompactHydraException(str(error)) from None
            if started_rank() == 0:
                print(error, file=sys.stderr, flush=True)
            raise SystemExit(MISCONFIGURED) from None

    return guarded


def _version_base() -> dict[str, str]:
    """Hydra 1.3 changes old behaviour only when asked; 1.4 no longer asks, and warns about the argument."""
    return {"version_base": "1.3"} if version("hydra-core").startswith("1.3.") else {}


def _quiet_other_ranks() -> None:
    """Under torchrun, SLURM or MPI, and on other machines, ranks run Hydra by themselves: only the first may write its folder.

    The others make one that is gone with them, until they hear of the first one's (`RankedStrategy.meet`).
    """
    rank = started_rank()
    if rank > 0:
        folder = tempfile.mkdtemp(prefix=f"lightning_par-rank-{rank}-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        sys.argv += ["hydra.output_subdir=null", f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]
