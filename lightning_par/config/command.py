"""What the commands on a composed config have in common: their words, how they compose what train.py would, where they draw."""

from __future__ import annotations

import argparse
import importlib
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
    """Let a parser take a folder of configs and the name of a primary one."""
    parser.add_argument("-cd", "--config-dir", metavar="DIR", help="a folder of more configs, such as recipes")
    parser.add_argument("-cn", "--config-name", metavar="NAME", help="the primary config (default: train)")


def add_config_words(parser: argparse.ArgumentParser) -> None:
    """Let a parser take what says a config: the options of `add_config_options` and Hydra's overrides."""
    add_config_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="GROUP=OPTION", help="Hydra overrides, such as parallel=tp2_pp2")


def run_composed(task: Callable[[DictConfig], Any], options: argparse.Namespace) -> None:
    """Run a task on the config that the words say, with the exit codes of `lightning_par.config.app`.

    Args:
        task: gets the config.
        options: what a parser with `add_config_words` found.
    """
    from lightning_par.config.app import app  # here, so that --help does not wait for Hydra

    flags = ["--config-dir", options.config_dir] if options.config_dir else []
    flags += ["--config-name", options.config_name] if options.config_name else []
    # Through Hydra's own command line, so that it composes exactly what train.py would.
    sys.argv = [sys.argv[0], *flags, *options.overrides, *_NO_OUTPUT]
    app(config_path="pkg://lightning_par.conf", config_name="train", has_folder=False)(task)()


def quiet_lightning() -> None:
    """Keep to itself what a Trainer says of this machine: nothing is trained on it."""
    for name in ("lightning_fabric", "pytorch_lightning"):  # before, because their import sets the level
        importlib.import_module(name)
    # All four names: the two packages say such things through one logger between them, that of the one that was imported last
    for name in ("lightning_fabric", "pytorch_lightning", "lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)


def written(folder: Path, write: Callable[[], Sequence[Path]]) -> Sequence[Path]:
    """The files that ``write`` has written into a folder of the user's.

    Raises:
        ConfigurationError: that folder cannot be written.
    """
    try:
        return write()
    except OSError as error:
        raise ConfigurationError(f"--output {folder} cannot be written ({error.strerror}): name another folder") from None
