"""The command `lightning-par`.

    lightning-par explain parallel=tp2_pp2             # what would run where, and why; nothing is trained or started
    lightning-par explain -cd recipes -cn demo         # the same for a recipe

Exit codes as in `lightning_par.config.app`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_par import __version__

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Nothing is written: no output folder, no log file, no copy of the config.
_NO_OUTPUT = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: words after the command's name; by default those it was started with.

    Raises:
        SystemExit: with code 2 where the configuration cannot work, 1 on any other error.
    """
    options = _parser().parse_args(arguments)
    options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-par", description="Hybrid parallel training of an unchanged LightningModule.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    explain = commands.add_parser(
        "explain",
        help="print the plan of a layout: which block on which stage, which weight split how, and why",
        description="Build the model and its first batch as train.py would, and print the plan. Nothing is trained and no "
        "process is started, so the layout may need more devices than this machine has.",
    )
    explain.add_argument("-cd", "--config-dir", metavar="DIR", help="a folder of more configs, such as recipes")
    explain.add_argument("-cn", "--config-name", metavar="NAME", help="the primary config (default: train)")
    explain.add_argument("overrides", nargs="*", metavar="GROUP=OPTION", help="Hydra overrides, such as parallel=tp2_pp2")
    explain.set_defaults(run=_explain)
    return parser


def _explain(options: argparse.Namespace) -> None:
    from lightning_par.config.app import app

    flags = ["--config-dir", options.config_dir] if options.config_dir else []
    flags += ["--config-name", options.config_name] if options.config_name else []
    # Through Hydra's own command line, so that it composes exactly what train.py would.
    sys.argv = [sys.argv[0], *flags, *options.overrides, *_NO_OUTPUT]
    app(config_path="pkg://lightning_par.conf", config_name="train")(explain)()


def explain(config: DictConfig) -> None:
    """Print the plan of a composed config.

    Raises:
        ConfigurationError: the layout, the model, the data or the ``plan:`` section cannot work.
    """
    import lightning_fabric
    import pytorch_lightning

    for package in (lightning_fabric, pytorch_lightning):  # after their import, which sets the level
        logging.getLogger(package.__name__).setLevel(logging.WARNING)  # what a Trainer says of this machine is not about the plan

    from lightning_par.config.run import build_run
    from lightning_par.host.preflight import plan_from_trainer
    from lightning_par.plan import render_plan

    trainer, module, data = build_run(config, accelerator="cpu", logger=False, callbacks=[])
    plan = plan_from_trainer(trainer, trainer.strategy.layout, trainer.strategy.overrides, "fit", module, data)
    print(render_plan(plan, color=sys.stdout.isatty()))


if __name__ == "__main__":
    main()
