"""The command `lightning-par check`: does a layout train the user's module as one process does?

Exit codes: 0 it does, 1 it does not, 2 what was typed cannot work.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_par.config.command import add_config_words, quiet_lightning, run_composed
from lightning_par.errors import ConfigurationError, ProcessError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_ABOUT = """\
Train your module for a few steps in one process and in a layout, on small batches of your data, in float32 on this CPU, and
compare every loss, the gradient norms, the gradient of every parameter and all weights. Needs no GPU, and starts as many
processes as the layout has ranks. Nothing is written.
"""
_WORDS = """\
A module of 10 million parameters or more is checked with fewer blocks of its chain, as many as the layout needs. Dropout is left
out. Exit code 0: equal. 1: different, or a rank failed. 2: the configuration cannot work.

examples:
  lightning-par check parallel=tp2_pp2
  lightning-par check parallel=tp2_dp2_zero3 --steps 5 --tolerance 1e-6
  lightning-par check -cd my_configs -cn run parallel=pp4 schedule=zb-h1 --full
"""


def add_check_command(commands: Any) -> None:
    """Add `check` to the subcommands of a parser. Imports nothing that is slow."""
    parser = commands.add_parser(
        "check",
        help="train in a layout and in one process, and compare losses, gradients and weights",
        description=_ABOUT,
        epilog=_WORDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_words(parser)
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="optimizer steps (default: 3)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, metavar="X", help="how large a relative error may be (default: 1e-5)"
    )
    parser.add_argument("--full", action="store_true", help="check a large module as large as it is")
    parser.set_defaults(run=lambda options: run_composed(partial(_check, options), options))


def _check(options: argparse.Namespace, config: DictConfig) -> None:
    """Check a composed config.

    Raises:
        ConfigurationError: whatever cannot work.
        SystemExit: with code 1, where the layout trains in another way, or a process has failed.
    """
    if options.steps < 1:
        raise ConfigurationError(f"--steps {options.steps}: the check compares what at least one step does: use --steps 1 or more")
    if not 0 < options.tolerance < math.inf:
        raise ConfigurationError(f"--tolerance {options.tolerance}: a relative error, which is positive: use --tolerance 1e-5")

    from rich.console import Console

    from lightning_par.config.run import build_run, build_trainer
    from lightning_par.parity.check import STRATEGY_OPTIONS, TRAINER_OPTIONS, check_parity
    from lightning_par.parity.report import print_report

    if config.parallel.get("auto"):
        raise ConfigurationError(
            "parallel=auto: check compares one layout with one process: name it, such as `lightning-par explain parallel=auto` says"
        )
    quiet_lightning()
    trainer, module, data = build_run(config, STRATEGY_OPTIONS, **TRAINER_OPTIONS, callbacks=[], **_devices(config.trainer))
    again = partial(build_trainer, config, **TRAINER_OPTIONS)
    try:
        report = check_parity(trainer, module, data, again, options.steps, options.tolerance, options.full, _tell)
    except ProcessError as error:
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # its processes are gone
        raise SystemExit(128 + signal.SIGINT) from None
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)  # names are whole in a file
    print_report(report, _left_out(config), console)
    if not report.comparison.is_equal:
        raise SystemExit(1)


def _devices(trainer: Mapping[str, Any]) -> dict[str, int]:
    """As many processes here as the user's Trainer has devices on all its nodes, where it says."""
    devices = trainer.get("devices", "auto")
    count = len(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else devices
    return {"devices": count * int(trainer.get("num_nodes", 1))} if isinstance(count, int) and count > 0 else {}


# What a check does without, and the values with which there is nothing to do without.
_USUAL: Mapping[str, tuple[Any, ...]] = {
    "trainer.precision": (None, 32, "32", "32-true"),
    "trainer.accumulate_grad_batches": (None, 1),
    "parallel.compile": (None, False),
    "parallel.fp8": (None,),
}


def _left_out(config: DictConfig) -> list[str]:
    """What the config says and the check does without."""
    said = {key: config[key.partition(".")[0]].get(key.partition(".")[2]) for key in _USUAL}
    return [f"{key}={value}" for key, value in said.items() if value not in _USUAL[key]]


def _tell(what: str) -> None:
    print(f"lightning-par check: {what}", file=sys.stderr, flush=True)
