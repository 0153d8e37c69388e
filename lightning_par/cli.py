"""The command `lightning-par`.

    lightning-par explain parallel=tp2_pp2             # what would run where, and why; nothing is trained or started
    lightning-par explain -cd recipes -cn demo --output mesh    # the same for a recipe, and its ranks drawn
    lightning-par plan cluster=h100_8x num_nodes=4     # the best layouts for the machines, and why not the others
    lightning-par calibrate cluster=h100_8x            # seconds of the model's blocks on this device, for plan
    lightning-par check parallel=tp2_pp2               # does the layout train as one process does? on a CPU
    lightning-par doctor parallel=tp2_dp2              # is this machine ready, and how fast is a collective on each axis?
    lightning-par simulate parallel=pp4_vp2_mb8 schedule=interleaved       # when each rank of a pipeline would do what
    lightning-par checkpoint show last.ckpt            # what is in a checkpoint; also verify, export, import, prune
    lightning-par tokenize corpus/ --output tokens     # texts to token files, for data=tokens

Exit codes as in `lightning_par.config.app`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_par import __version__
from lightning_par.calibrate_command import add_calibrate_command
from lightning_par.check_command import add_check_command
from lightning_par.checkpoint_command import add_checkpoint_command
from lightning_par.config.command import add_config_words, quiet_lightning, run_composed, written
from lightning_par.doctor_command import add_doctor_command
from lightning_par.errors import ConfigurationError
from lightning_par.plan_command import add_plan_command
from lightning_par.tokenize_command import add_tokenize_command

if TYPE_CHECKING:
    from omegaconf import DictConfig

_SIMULATE_WORDS = """\
keys:
  parallel=WORD      a layout with pp, such as pp4_mb8 or pp4_vp2_mb8
  schedule=NAME      gpipe, 1f1b, interleaved, zb-h1, interleaved-zb, zb-v or auto (default: 1f1b, with vp interleaved)
  forward=TIME       of one microbatch's forward on a stage (default: 1)
  input=TIME         of the gradient of a stage's input (default: 1)
  weight=TIME        of the gradients of a stage's weights (default: 1); a whole backward takes input + weight
  transfer=TIME      from rank to rank (default: 0)

A TIME is a number in any unit, or one for each stage: forward=[1,1,2,1]. Without mb there are twice as many microbatches as
ranks.

examples:
  lightning-par simulate parallel=pp4_vp2_mb8 schedule=interleaved
  lightning-par simulate parallel=pp4_mb16 schedule=zb-h1 forward=[1,1,1,1.5] input=1 weight=0.8 transfer=0.1
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: words after the command's name; by default those it was started with.

    Raises:
        SystemExit: with code 2 where the configuration cannot work, 1 on any other error.
    """
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if others:  # overrides behind an option, which argparse does not put together with those before it
        before = vars(options).get("overrides")
        if before is None or any(word.startswith("-") for word in others):
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        options.overrides = [*before, *others]
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
    add_config_words(explain)
    explain.add_argument("--output", metavar="FOLDER", help="where to draw the device mesh, as a page and a PNG (default: nowhere)")
    explain.set_defaults(run=_explain)
    add_plan_command(commands)
    add_calibrate_command(commands)
    simulate = commands.add_parser(
        "simulate",
        help="draw a pipeline schedule: a table here, and a page, a PNG and a Chrome trace in a folder",
        description="Run a pipeline schedule on imaginary ranks and draw what each of them would do when. Needs no model and no "
        "devices.",
        epilog=_SIMULATE_WORDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    simulate.add_argument("words", nargs="+", metavar="KEY=VALUE", help="the layout, the schedule and the costs, see below")
    simulate.add_argument("--output", metavar="FOLDER", help="where to draw (default: simulate/LAYOUT-SCHEDULE)")
    simulate.set_defaults(run=_simulate)
    add_check_command(commands)
    add_doctor_command(commands)
    add_checkpoint_command(commands)
    add_tokenize_command(commands)
    return parser


def _simulate(options: argparse.Namespace) -> None:
    from rich.console import Console  # here, so that --help does not wait for it

    from lightning_par.picture import write_picture
    from lightning_par.picture.report import print_simulation
    from lightning_par.picture.simulation import read_simulation

    try:
        simulation = read_simulation(options.words)
        print_simulation(simulation, Console())
        folder = Path(options.output or f"simulate/{simulation.name}")
        drawn = written(folder, lambda: write_picture(simulation.picture, folder))
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(f"drawn: {', '.join(map(str, drawn))}")


def _explain(options: argparse.Namespace) -> None:
    run_composed(lambda config: explain(config, options.output), options)


def explain(config: DictConfig, output: str | None = None) -> None:
    """Print the plan of a composed config and the device mesh, and draw the latter.

    Args:
        config: the composed config.
        output: folder for the page and the PNG; None draws nothing.

    Raises:
        ConfigurationError: the layout, the model, the data or the ``plan:`` section cannot work, or ``output`` cannot be written.
    """
    from rich.console import Console

    from lightning_par.config.run import build_run
    from lightning_par.host.plan_report import describe_plan
    from lightning_par.host.preflight import plan_from_trainer
    from lightning_par.picture.mesh import mesh_of, print_mesh, write_mesh

    quiet_lightning()
    trainer, module, data = build_run(config, accelerator="cpu", logger=False, callbacks=[])
    strategy = trainer.strategy
    if strategy.layout.auto:
        strategy.choose_layout(trainer, module, data)
        print("\n".join(strategy.choice.reasons), end="\n\n")
    plan = plan_from_trainer(trainer, "fit", module, data, foresees=True)
    print(describe_plan(plan, strategy.schedule, color=sys.stdout.isatty()))
    # As many processes as the layout needs are not a machine that anybody has.
    is_imagined = config.trainer.get("devices", "auto") == "auto" and trainer.num_nodes == 1
    mesh = mesh_of(plan, None if is_imagined else plan.layout.world_size // trainer.num_nodes)
    if plan.layout.world_size > 1:
        print_mesh(mesh, Console(width=None if sys.stdout.isatty() else 132))
    if output is not None:
        drawn = written(Path(output), lambda: write_mesh(mesh, Path(output)))
        print(f"drawn: {', '.join(map(str, drawn))}")


if __name__ == "__main__":
    main()
