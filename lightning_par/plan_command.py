"""The command `lightning-par plan`: the best layouts of a model on a cluster, before a device is there.

    lightning-par plan cluster=h100_8x num_nodes=4 batch=512
    lightning-par plan cluster=h100_8x batch=64 model.network.width=4096 trainer.precision=bf16-true
    lightning-par plan -cd recipes -cn demo --json cluster=a100_8x num_nodes=2

Exit codes: 0 done, 2 what was typed cannot work or nothing fits.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_par.config.command import add_config_options, quiet_lightning, run_composed, written
from lightning_par.errors import ConfigurationError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lightning_par.config.cluster import Question

_EPILOG = """\
keys:
  cluster=NAME       the machines: a file of conf/cluster, of cluster/ in --config-dir, or a path
  cluster.KEY=VALUE  one number of it, such as cluster.device.memory_gib=40
  num_nodes=N        nodes (default: those of trainer.num_nodes)
  batch=N            samples of a step over all replicas (default: those of the first batch)
  parallel=WORD      a layout of yours: whether it divides and fits, and by how much it is slower than the best, and why
  calibration=FILE   what `lightning-par calibrate` has measured, or none (default: what it has of this cluster)

All other words are Hydra overrides, such as model=gpt or trainer.precision=bf16-true. The first line that is printed is what to
type for the best layout.

examples:
  lightning-par plan cluster=h100_8x num_nodes=4 batch=512
  lightning-par plan --output plan cluster=laptop model.network.width=512
"""


def add_plan_command(commands: Any) -> None:
    """Add `plan` to the subcommands of a parser. Imports nothing that is slow."""
    parser = commands.add_parser(
        "plan",
        help="find the best layouts of a model on a cluster: time, memory, and why not the others",
        description="Build the model and its first batch as train.py would, take its blocks apart on tensors without memory, and "
        "search all layouts of a cluster. Nothing is trained, and no device is needed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--output", metavar="FOLDER", help="draw the best layouts there: plan.html, plan.png, and a pipeline's timeline"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the machines and Hydra overrides, see below")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from lightning_par.config.cluster import load_cluster, read_question

    try:
        question = read_question(options.overrides)
        load_cluster(question, options.config_dir)  # what is wrong with it is said at once
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None

    options.overrides = [*question.overrides, "parallel=single"]
    run_composed(lambda config: _print(config, question, options), options)


def _print(config: DictConfig, question: Question, options: argparse.Namespace) -> None:
    from rich.console import Console

    from lightning_par.config.cluster import load_cluster
    from lightning_par.config.run import build_run
    from lightning_par.host.outlook import outlook_of
    from lightning_par.planner.report import outlook_json, print_outlook

    quiet_lightning()
    if question.num_nodes is None:
        question = replace(question, num_nodes=config.trainer.get("num_nodes", 1))
    cluster = load_cluster(question, options.config_dir)
    trainer, module, data = build_run(config, accelerator="cpu", devices=1, num_nodes=1, logger=False, callbacks=[])
    with Console(stderr=True).status("building the model") as status:
        outlook, tokens = outlook_of(trainer, module, data, cluster, question.batch, status.update, question.layout)
    if options.json:
        print(json.dumps(outlook_json(outlook, tokens)))
    else:
        print_outlook(outlook, Console(width=None if sys.stdout.isatty() else 132), tokens)
    if options.output is not None:
        from lightning_par.planner.drawing import write_pictures

        folder = Path(options.output)
        drawn = written(folder, lambda: write_pictures(outlook, folder, tokens))
        print(f"drawn: {', '.join(map(str, drawn))}", file=sys.stderr if options.json else sys.stdout)
