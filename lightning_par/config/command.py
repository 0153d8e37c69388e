"""What the commands that look at a composed config have in common: their options, how they compose, and where they draw."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_par.errors import ConfigurationError

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Nothing is written: no output folder, no log file, no copy of the config.
_NO_OUTPUT = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout"]


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which config is composed."""
    parser.add_argument("-cd", "--config-dir", metavar="DIR", help="a folder of more configs, such as recipes")
    parser.add_argument("-cn", "--config-name", metavar="NAME", help="the primary config (default: train)")


def run_composed(options: argparse.Namespace, overrides: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    """Run ``task`` on the config that train.py would compose, through Hydra's own command line.

    Raises:
        SystemExit: with code 2 where the configuration cannot work.
    """
    from lightning_par.config.app import app

    flags = ["--config-dir", options.config_dir] if options.config_dir else []
    flags += ["--config-name", options.config_name] if options.config_name else []
    sys.argv = [sys.argv[0], *flags, *overrides, *_NO_OUTPUT]
    app(config_path="pkg://lightning_par.conf", config_name="train")(task)()


def quieten_trainer() -> None:
    """What a Trainer says of this machine is not about a plan."""
    import lightning_fabric
    import pytorch_lightning

    for package in (lightning_fabric, pytorch_lightning):  # after their import, which sets the level
        logging.getLogger(package.__name__).setLevel(logging.WARNING)


def written(folder: Path, write: Callable[[], Sequence[Path]]) -> Sequence[Path]:
    """The files that ``write`` has written into a folder of the user's.

    Raises:
        ConfigurationError: that folder cannot be written.
    """
    try:
        return write()
    except OSError as error:
        raise ConfigurationError(f"--output {folder} cannot be written ({error.strerror}): name another folder") from None
