"""The command line that starts one more rank of this run.

A plain script is run again as it was typed. Under Hydra that would be wrong: a child of a ``--multirun`` would run the whole
sweep again, and ``${now:...}`` would give it another folder. There the command is made from the composed job instead: the
same primary config and search path, this job's own overrides, always a single run that writes into the same folder.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# How the user's script was started. In the environment, because the workers of Hydra's submitit and joblib launchers have
# another ``__main__`` than the user's.
MAIN = "LIGHTNING_PAR_MAIN"

# A sweep's own settings, and those that the child command sets itself.
_PARENT_ONLY = (
    "hydra.run.",
    "hydra.sweep.",
    "hydra.mode=",
    "hydra.output_subdir=",
    "hydra.job.name=",
    "hydra/launcher=",
    "hydra/sweeper=",
    "hydra.launcher",
    "hydra.sweeper",
)


def remember_main() -> None:
    """Keep how this program was started, for workers that inherit the environment but not ``__main__``."""
    os.environ[MAIN] = json.dumps(_main())


def output_folder() -> str | None:
    """The folder of this process's Hydra job, which tells one job from the next; ``None`` outside of Hydra."""
    config = _hydra_config()
    return None if config is None else config.runtime.output_dir


def take_output_folder(folder: str | None) -> None:
    """Let ``${hydra:runtime.output_dir}`` be the folder of the first rank from now on; nothing outside of Hydra."""
    config = _hydra_config()
    if config is None or folder is None:
        return
    from omegaconf import read_write

    with read_write(config.runtime):
        config.runtime.output_dir = folder


def is_sweep() -> bool:
    """Whether this process runs a job of a sweep of Hydra's."""
    config = _hydra_config()
    return config is not None and config.mode is not None and config.mode.name == "MULTIRUN"


def rank_command() -> tuple[list[str], str | None]:
    """The command of any rank of this machine, and the folder to start it in (``None`` for this one)."""
    config = _hydra_config()
    if config is None:
        return [sys.executable, *_main(), *sys.argv[1:]], None
    return _hydra_command(config), config.runtime.cwd


def _main() -> list[str]:
    import __main__

    spec = getattr(__main__, "__spec__", None)  # set by `python -m`
    return ["-m", spec.name] if spec else [os.path.abspath(sys.argv[0])]


def _hydra_config() -> Any:
    if "hydra" not in sys.modules:
        return None
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.get() if HydraConfig.initialized() else None


def _hydra_command(config: Any) -> list[str]:
    from omegaconf import OmegaConf

    command = [sys.executable, *json.loads(os.environ.get(MAIN) or json.dumps(_main()))]
    for source in config.runtime.config_sources:
        if source.provider == "main":
            path = source.path if source.schema == "file" else f"{source.schema}://{source.path}"
            command += ["--config-path", path]
        elif source.provider == "command-line":
            command += ["--config-dir", source.path]
    if config.job.config_name:
        command += ["--config-name", config.job.config_name]
    command += list(config.overrides.task)
    command += [override for override in config.overrides.hydra if not override.lstrip("+~").startswith(_PARENT_ONLY)]
    folder = config.runtime.output_dir.replace("\\", "\\\\").replace("'", "\\'")
    command += ["hydra.mode=RUN", f"hydra.run.dir='{folder}'", "hydra.output_subdir=null"]
    command += [f"hydra.job.name={config.job.name}"]
    command += [f"hydra.job.{key}={config.job[key]}" for key in ("num", "id") if not OmegaConf.is_missing(config.job, key)]
    return command
