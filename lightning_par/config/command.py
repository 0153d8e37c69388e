"""The words of a command that works on what train.py would train: the same options, composed to the same config."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Nothing is written: no output folder, no log file, no copy of the config.
_NO_OUTPUT = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout"]


def add_config_words(parser: argparse.ArgumentParser) -> None:
    """Let a parser take what says a config: a folder, a primary config and Hydra's overrides."""
    parser.add_argument("-cd", "--config-dir", metavar="DIR", help="a folder of more configs, such as recipes")
    parser.add_argument("-cn", "--config-name", metavar="NAME", help="the primary config (default: train)")
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
    app(config_path="pkg://lightning_par.conf", config_name="train")(task)()


def quiet_lightning() -> None:
    """Keep to itself what a Trainer says of this machine: nothing is trained on it."""
    import lightning_fabric
    import pytorch_lightning

    packages: tuple[Any, ...] = (lightning_fabric, pytorch_lightning)
    for package in packages:  # after their import, which sets the level
        logging.getLogger(package.__name__).setLevel(logging.WARNING)
